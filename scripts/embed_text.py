"""Cut the small texts that ship with latmix out of the Wikipedia files: whole articles up to the wished size.

python scripts/embed_text.py wikipedia-2015-3.jsonl.zst 800000 src/latmix/assets/wikipedia-calibration.txt
python scripts/embed_text.py wikipedia-2015-heldout.jsonl.zst 200000 src/latmix/assets/wikipedia-evaluation.txt
"""

import sys
from pathlib import Path

from train_model import articles


def main() -> None:
    source, characters, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    kept: list[str] = []
    for text in articles([source]):
        kept.append(text.strip())
        if sum(map(len, kept)) >= characters:
            break
    out.write_text("\n\n".join(kept) + "\n", "utf-8")
    print(f"{out}: {len(kept)} articles, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
