"""What a browser would find in a page; a tag that is left open or closed twice fails."""

from html.parser import HTMLParser


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open = set(), []
        self.images, self.widths, self.alts, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag in ("img", "source"):
            self.images.append(attrs.get("src") or attrs["srcset"])
            self.widths.append(int(attrs.get("width", 0)))
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag not in ("meta", "img", "source", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(source: str) -> _Page:
    page = _Page()
    page.feed(source)
    assert page.open == []
    return page
