"""Renders chat templates, sets their arguments, and keeps control tokens out of texts.

A control token such as <|im_end|> structures a conversation, so only the chat template may write
one. If a problem or a model spells one, it is encoded as plain characters:

    a text                   write <|im_end|> here
    broken (~ is BREAK)      write <~|im_end|> here
    rendered, in a template  <|im_start|>user\\nwrite <~|im_end|> here<|im_end|>\\n
    encoded                  the parts between the breaks, one after another

A text that spells none is encoded in one piece.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepwiser_jax.errors import UserError

Argument = bool | int | float | str

BREAK = "\ud800"
"""Half of a surrogate pair: no text that can be encoded contains it."""

WORDS_OF_MODELS = ("<think>", "</think>", "<chunk>", "</chunk>")
"""Tokens that models write in answers like words. They neither begin nor end a turn."""

GIVEN = {
    *("messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
}
"""Names that every template may use: they are not arguments."""


class ControlTokens:
    """The tokens that no text may spell.

    They are the `special` tokens, and the `other` added tokens that the chat template writes.
    (DeepSeek-R1's distilled models mark turns with tokens that are not special.) All other added
    tokens are plain words."""

    def __init__(self, special: Iterable[str], other: Iterable[str], template: str | None):
        written = (token for token in other if template is not None and token in template)
        self.tokens = frozenset(
            token
            for token in itertools.chain(special, written)
            # Templates and texts both write white space; a single character cannot be broken.
            if len(token.strip()) > 1 and token not in WORDS_OF_MODELS
        )
        of_first = itertools.groupby(sorted(self.tokens), key=lambda token: token[0])
        begins = (
            f"{re.escape(first)}(?={'|'.join(re.escape(token[1:]) for token in tokens)})"
            for first, tokens in of_first
        )
        self._begins = re.compile("|".join(begins) or "(?!)")

    def spelled_in(self, text: str) -> bool:
        return self._begins.search(text) is not None

    def broken(self, text: str) -> str:
        """Returns the text with a BREAK after the first character of every control token."""
        return self._begins.sub(rf"\g<0>{BREAK}", text)


def default_template(templates: Any) -> str | None:
    """Returns a tokenizer's chat template; if it has several with names, the one named default."""
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    return templates.get("default") if isinstance(templates, dict) else templates


def render(
    template: str | None,
    messages: Sequence[dict[str, str]],
    control: ControlTokens,
    *,
    add_generation_prompt: bool,
    **tokens: Any,
) -> str:
    """Returns the conversation as text, with breaks in the control tokens that messages spell.

    Args:
        template: Jinja, as transformers reads it.
        messages: Each with its role and content.
        control: The tokens that contents must not spell.
        add_generation_prompt: Whether to begin the assistant's turn.
        tokens: Special tokens by their names, such as bos_token.

    Raises:
        UserError: There is no template, or it fails.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    if template is None:
        raise UserError(
            "the tokenizer has no chat template: set prompt_style to 'bare', or use an "
            "instruction-tuned model's tokenizer"
        )
    chat = [message | {"content": control.broken(message["content"])} for message in messages]
    try:
        (text,), _ = render_jinja_template(
            [chat], chat_template=template, add_generation_prompt=add_generation_prompt, **tokens
        )
    except Exception as error:  # a template is a program, and not ours
        raise UserError(f"the chat template failed: {error}") from None
    return text


def with_arguments(
    template: str | None,
    arguments: Mapping[str, Argument],
    where: str,
    *,
    trained: bool = False,
) -> str | None:
    """Returns the template with its arguments set in its first lines. So they are exported with the
    template, and everybody prompts a model as it was trained.

    Args:
        template: Jinja, as transformers reads it.
        arguments: Values by name. Those that the first lines set already may be repeated.
        where: The tokenizer's path, for messages.
        trained: Whether a run of this project trained the model, so that nothing may change.

    Raises:
        UserError: The template does not use an argument, or sets it to another value.
    """
    if not arguments:
        return template
    if template is None:
        raise UserError(
            f"chat_template_args: {where} has no chat template, found {dict(arguments)}: leave "
            "them out"
        )
    fixed, free = _arguments_of(template)
    news = {name: value for name, value in arguments.items() if fixed.get(name) != value}
    for name, value in news.items():
        if name in fixed or trained:
            was = f"with {name}: {json.dumps(fixed[name])}" if name in fixed else f"without {name}"
            raise UserError(
                f"chat_template_args: the model of {where} was trained, or is exported, {was}, "
                f"and is prompted the same way for ever, found {json.dumps(value)}: leave it out"
            )
        if name not in free:
            known = f"expected some of {sorted(free)}" if free else "it takes none, leave it out"
            raise UserError(
                f"chat_template_args: the chat template of {where} does not use {name!r}: {known}"
            )
    lines = [f"{{% set {n} = {json.dumps(v, ensure_ascii=False)} %}}\n" for n, v in news.items()]
    return "".join(lines) + template


def _arguments_of(template: str) -> tuple[dict[str, Any], set[str]]:
    """Returns the arguments that the first lines set, and the names that may be set. Raises
    UserError for a broken template."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    # Only transformers knows this tag; it changes nothing that is rendered.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        tree = Environment(trim_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: {error}") from None
    fixed: dict[str, Any] = {}
    for node in tree.body:
        if not (isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name)):
            break
        value: Any = node.node
        try:
            fixed[node.target.name] = value.as_const()
        except nodes.Impossible:
            break
    return fixed, meta.find_undeclared_variables(tree) - GIVEN
