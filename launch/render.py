"""Fill a YAML template: python launch/render.py TEMPLATE KEY=VALUE ... -- WORD ...

${KEY} in the template is replaced by its value *after* the YAML is parsed, so that no value can
change what the document says. A scalar that is ${KEY} alone becomes a number where the value is
one; the list item ${RUN} becomes the words after --. A missing or unused key is an error.
"""

import re
import sys
from pathlib import Path

import yaml

PLACEHOLDER = re.compile(r"\$\{([A-Z_]+)\}")


def fill(node, values: dict[str, str], words: list[str]):
    """The node with every placeholder replaced; KeyError names one without a value."""
    if isinstance(node, dict):
        return {key: fill(child, values, words) for key, child in node.items()}
    if isinstance(node, list):
        filled = [words if item == "${RUN}" else [fill(item, values, words)] for item in node]
        return [item for items in filled for item in items]
    if not isinstance(node, str):
        return node
    text = PLACEHOLDER.sub(lambda match: values[match[1]], node)
    return int(text) if PLACEHOLDER.fullmatch(node) and re.fullmatch(r"[0-9]+", text) else text


def main(template: str, *arguments: str) -> str:
    """The YAML to send."""
    split = arguments.index("--")
    values = dict(argument.split("=", 1) for argument in arguments[:split])
    # Kubernetes expands $(NAME) in commands; what a person typed stays as it was typed.
    words = [word.replace("$", "$$") for word in arguments[split + 1 :]]
    text = Path(template).read_text()
    used = set(PLACEHOLDER.findall(text)) - {"RUN"}
    if used != set(values):
        sys.exit(f"error: {template}: expected values for {sorted(used)}, found {sorted(values)}")
    return yaml.safe_dump(fill(yaml.safe_load(text), values, words), sort_keys=False)


if __name__ == "__main__":
    print(main(*sys.argv[1:]), end="")
