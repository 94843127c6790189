"""mkdocs: what is right on GitHub is right on the site too.

benchmarks/RESULTS.md is a page, and links between it and docs/ lead there. What belongs to an item of a numbered list is
indented by 3 spaces, and Python-Markdown wants 4 and an empty line before the next item. "no-run" beside ``python`` is for
tests/test_docs.py.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "RESULTS.md"


def on_files(files, config):
    files.append(File.generated(config, "results.md", abs_src_path=str(RESULTS)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "results.md":
        markdown = markdown.replace("](../docs/", "](")
    markdown = markdown.replace("](../benchmarks/RESULTS.md", "](results.md")
    parts = markdown.replace("```python no-run", "```python").split("```")  # every second one is code
    parts[::2] = [_spaced(part) for part in parts[::2]]
    return "```".join(parts)


def _spaced(text):
    text = re.sub(r"^ {3}(?=\S)", "    ", text, flags=re.MULTILINE)
    return re.sub(r"^( {4}\S.*)\n(?=\d+\. )", r"\1\n\n", text, flags=re.MULTILINE)
