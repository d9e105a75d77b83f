"""Prints docs/errors.md from the tree of errors: python scripts/errors_page.py > docs/errors.md"""

from latmix.errors import explained, tree

HEAD = """# Errors

Every error of latmix is one sentence: the culprit, then the choices. This page lists their kinds, as
`latmix list errors` does; it is generated from `src/latmix/errors.py` by
`python scripts/errors_page.py > docs/errors.md`. Anything that ends in a traceback is a bug of latmix.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the input was good, the work failed: {failed} |
| 2 | bad input or usage: {refused} |
| 130 | interrupted (Ctrl-C) |
| 143 | terminated (SIGTERM) |
"""


def page() -> str:
    names = {code: ", ".join(kind.__name__ for kind in tree() if kind.exit_code == code) for code in (1, 2)}
    parts = [HEAD.format(failed=names[1], refused=names[2])]
    for kind in tree():
        line, cause, remedy = explained(kind)
        place = f"Exit code {kind.exit_code}; a kind of `{kind.__bases__[0].__name__}`."
        parts.append(f"## {kind.__name__}\n\n{line}\n\n- Cause: {cause}\n- Remedy: {remedy}\n- {place}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
