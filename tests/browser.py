"""Looks at a page in a headless browser, in a frame of the width that is wanted: a window has a least width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def title_of(address: str, folder: Path) -> Any:
    """The JSON that the script of a page leaves in its title; skips the test where there is no browser."""
    browser = next((found for found in map(shutil.which, _BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(_BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.+?)</title>", done.stdout)
    assert title is not None, done.stderr
    return json.loads(html.unescape(title[1]))
