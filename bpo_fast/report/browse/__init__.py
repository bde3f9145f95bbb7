"""Preference pairs as a page to look at: a static folder that a browser opens from the disk, with no server.

`write_browser` is all that others need. Of rows it makes records (`records.py`), of images thumbnails
(`thumbnails.py`), of both the folder (`write.py`); `page/` holds what runs in the browser.
"""

from bpo_fast.report.browse.write import write_browser

__all__ = ["write_browser"]
