"""For MkDocs: pages name each other as `docs/NAME.md`, as they do in the repository; on the site that is a link."""

import re
from typing import Any


def on_page_markdown(markdown: str, **page: Any) -> str:
    del page
    return re.sub(r"`docs/(\w+)\.md`", r"[\1](\1.md)", markdown)
