"use strict";
// Makes elements, and the nodes of texts that models wrote: their mathematics rendered by Temml, all
// else as text nodes.
const texts = (() => {
  // Makes an element. Strings among the children become text nodes; null and false are left out.
  function el(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }
  function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  }
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) node.setAttribute(name, "");
      else if (value !== null && value !== false && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat(3).filter((child) => child !== null && child !== false));
    return node;
  }
  function button(label, onClick, attributes = {}) {
    const node = el("button", { type: "button", ...attributes }, label);
    node.addEventListener("click", onClick);
    return node;
  }

  const MATHS = new RegExp(
    [
      "\\$\\$([^]{1,2000}?)\\$\\$",
      "\\\\\\[([^]{1,2000}?)\\\\\\]",
      "\\\\\\(([^]{1,2000}?)\\\\\\)",
      "\\$((?![\\s$])(?:\\\\[^]|[^$\\\\\\n]){1,500}?)(?<!\\s)\\$(?!\\d)",
      "(\\\\begin\\{(?:align|aligned|equation|gather|cases|[bpv]?matrix)\\*?\\}[^]{1,2000}?\\\\end\\{\\w{1,9}\\*?\\})",
      "(\\\\boxed\\{)",
    ].join("|"),
    "g",
  );
  const MAX_FORMULAS = 200;

  // Returns the nodes of a text, without its chunk tags.
  function rich(text) {
    const parts = document.createDocumentFragment();
    const plain = text.replace(/<\/?chunk>/g, "").trim();
    let end = 0;
    let formulas = 0;
    for (const match of plain.matchAll(MATHS)) {
      if (match.index < end) continue;
      let [source, tex, isDisplay] = [match[0], match[3] ?? match[4], false];
      if (match[1] !== undefined || match[2] !== undefined || match[5] !== undefined) {
        [tex, isDisplay] = [match[1] ?? match[2] ?? match[5], true];
      } else if (match[6] !== undefined) {
        const close = closingBrace(plain, match.index + source.length);
        if (close < 0) continue;
        source = plain.slice(match.index, close + 1);
        tex = source.replace(/^\\boxed\{\s*([A-Za-z][A-Za-z ]+?)\s*\}$/, "\\boxed{\\text{$1}}");
      }
      if ((formulas += 1) > MAX_FORMULAS) break;
      parts.append(plain.slice(end, match.index), formula(source, tex, isDisplay));
      end = match.index + source.length;
    }
    parts.append(plain.slice(end));
    return parts;
  }
  function closingBrace(text, start) {
    let depth = 1;
    for (let i = start; i < Math.min(text.length, start + 2000); i += 1) {
      if (text[i] === "\\") i += 1;
      else if (text[i] === "{") depth += 1;
      else if (text[i] === "}" && (depth -= 1) === 0) return i;
    }
    return -1;
  }
  function formula(source, tex, displayMode) {
    const node = el("span", { class: displayMode ? "formula display" : "formula" });
    try {
      temml.render(tex, node, { displayMode, throwOnError: true, maxSize: [20, 200], maxExpand: 200 });
    } catch {
      node.className = "unrendered";
      node.replaceChildren(source);
    }
    return node;
  }

  return { el, svg, button, rich };
})();
