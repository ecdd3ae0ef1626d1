"""The site: it is built without a warning, its links and anchors lead somewhere, and its search knows the words of the field."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.release, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    for module in ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(module, reason="it needs the extra probdiff[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Page(HTMLParser):
    """The anchors of a page, and what it links to or shows."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.targets = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def test_every_link_and_anchor_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.relative_to(site).parts}
    assert len(pages) > 100
    missing = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            goal = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchored = not url.fragment or goal not in pages or unquote(url.fragment) in pages[goal].anchors
            missing += [] if goal.exists() and anchored else [f"{path.relative_to(site)}: {target}"]
    assert not missing


def test_the_notebook_shows_its_figures(site):
    page = Page(site / "notebooks" / "diffusion_in_forty_minutes.html")
    assert len([target for target in page.targets if "_images" in target]) == 5


def test_the_search_knows_the_words_of_the_field(site):
    """The index has the stems of words, each with the page or the pages that it is on."""
    text = (site / "searchindex.js").read_text()
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    guide = index["docnames"].index("guides/estimators")
    for stem in ("control", "variat"):
        on = index["terms"][stem]
        assert guide in (on if isinstance(on, list) else [on])
