// Sends a problem and its solution to /check, and shows what the judge writes as it comes. What
// models wrote becomes text nodes, and nothing else.
(() => {
  const { el, rich } = texts;
  const byId = (id) => document.getElementById(id);
  const facts = JSON.parse(byId("facts").textContent);
  const MARKS = { Positive: ["✓ Positive", "good"], Negative: ["✗ Negative", "bad"] };
  let steps = [];
  let asking = null;

  const count = (chunks) => `${chunks.length} ${chunks.length === 1 ? "step" : "steps"}`;
  const announce = (text) => { byId("status").textContent = text; };
  const summarize = (text, kind = "") => {
    byId("summary").className = `headline ${kind}`;
    byId("summary").textContent = text;
  };

  function makeStep(text, i) {
    const mark = el("span", { class: "muted" }, "waits");
    const p = el("span", { class: "p" });
    const thought = el("div", { class: "said thought" });
    const node = el("li", {},
      el("p", { class: "top" }, el("span", { class: "step" }, `Step ${i + 1}`), mark, p),
      el("div", { class: "said" }, rich(text)),
      el("h3", {}, "Judge"), thought);
    return { node, mark, p, thought, written: "" };
  }

  const on = {
    begun({ chunks }) {
      steps = chunks.map(makeStep);
      byId("chunks").replaceChildren(...steps.map((step) => step.node));
      summarize(`The judge reads ${count(chunks)} …`);
    },
    written({ chunk, text }) {
      const step = steps[chunk];
      step.written += text;
      step.thought.textContent = step.written.trimStart();
      step.node.classList.add("writing");
      step.mark.textContent = "writes …";
    },
    judged({ chunk, verdict, p_positive, reasoning }) {
      const step = steps[chunk];
      const [words, kind] = MARKS[verdict] ?? ["? no verdict", "warn"];
      step.node.classList.remove("writing");
      step.mark.replaceWith(step.mark = el("strong", { class: kind }, words));
      step.p.textContent = `P(Positive) ${p_positive.toFixed(3)}`;
      step.thought.replaceChildren(rich(reasoning));
      announce(`Step ${chunk + 1}: ${words.slice(2)}`);
    },
    result({ chunks, whole, first_error: first, unknown_words: unknown }) {
      if (first >= 0) {
        steps[first].node.classList.add("first-error");
        steps[first].mark.after(el("span", { class: "bad" }, "the first error"));
        summarize(`The first error is in step ${first + 1} of ${chunks.length}.`, "bad");
      } else summarize(`No error found in ${count(chunks)}.`, "good");
      if (whole) {
        const [words, kind] = MARKS[whole.verdict] ?? ["? no verdict", "warn"];
        byId("chunks").append(el("li", {},
          el("p", { class: "top" }, el("span", { class: "step" }, "The whole solution"),
            el("strong", { class: kind }, words), el("span", { class: "p" }, `P(Positive) ${whole.p_positive.toFixed(3)}`)),
          el("div", { class: "said thought" }, rich(whole.reasoning))));
      }
      byId("warning").hidden = !unknown.length;
      byId("warning").textContent = `The judge has never seen these words, so it guesses: ${unknown.join(" ")}`;
      announce(byId("summary").textContent);
    },
    error({ error }) {
      throw new Error(error.message);
    },
  };

  function take(block) {
    const name = /^event: (.*)$/m.exec(block)?.[1];
    const data = /^data: (.*)$/m.exec(block)?.[1];
    if (data && Object.hasOwn(on, name)) on[name](JSON.parse(data));
  }

  async function judge() {
    const key = byId("key").value.trim();
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const body = JSON.stringify({ question: byId("question").value, solution: byId("solution").value, stream: true });
    const response = await fetch("check", { method: "POST", headers, body, signal: asking.signal });
    if (!response.ok) {
      if (response.status === 401) byId("key-field").hidden = false;
      const found = await response.json().catch(() => null);
      throw new Error(found?.error?.message ?? `the server answers ${response.status}`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let left = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const blocks = (left + value).split("\n\n");
      left = blocks.pop();
      blocks.forEach(take);
    }
  }

  async function submit() {
    if (asking || !byId("form").reportValidity()) return;
    asking = new AbortController();
    steps = [];
    byId("chunks").replaceChildren();
    byId("warning").hidden = true;
    byId("submit").disabled = true;
    byId("stop").hidden = false;
    summarize("Sent. It waits for its turn …");
    announce("Sent");
    try {
      await judge();
      if (!/[.]$/.test(byId("summary").textContent)) throw new Error("the connection ended early");
    } catch (error) {
      const text = error.name === "AbortError" ? "Stopped." : `Not judged: ${error.message}`;
      for (const step of steps) step.node.classList.remove("writing");
      summarize(text, "warn");
      announce(text);
    }
    asking = null;
    byId("submit").disabled = false;
    byId("stop").hidden = true;
  }

  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  byId("stop").addEventListener("click", () => asking?.abort());
  byId("example").hidden = !facts.example;
  byId("example").addEventListener("click", () => {
    byId("question").value = facts.example.question;
    byId("solution").value = facts.example.solution;
    submit();
  });
  byId("key-field").hidden = !facts.needs_key;
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
  });
})();
