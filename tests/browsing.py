"""JupyterLab in a browser that nobody sees, for the tests that drive widgets there."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time

import pytest

from erasekit.paths import ROOT

IDLE = """
const session = window.jupyterapp?.shell.currentWidget?.sessionContext;
return Boolean(session?.isReady && session.session?.kernel?.status === "idle");
"""
RUN = """
const notebook = window.jupyterapp.shell.currentWidget.content;
notebook.activeCellIndex = arguments[0];
window.jupyterapp.commands.execute("notebook:run-cell");
"""


def until(true, what: str, seconds: float = 240):
    """The first true value of `true()`; the limit is for a machine that is busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := true():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="the browser test needs selenium: pip install erasekit[browser]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "the browser test needs Chromium and chromedriver, as in Debian's chromium chromium-driver"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "window-size=1280,1000", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a free port, with a token and without any settings of this machine: the address of a folder."""
    home, folder, token = tmp_path / "jupyter", tmp_path / "notebooks", secrets.token_hex(16)
    folder.mkdir()
    news = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    places = {"RUNTIME": "runtime", "CONFIG": "config", "DATA": "data"}
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}_DIR": str(home / place) for name, place in places.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": str(ROOT),
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--expose-app-in-browser",
    ]
    log = tmp_path / "lab.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=environment,
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        files = until(
            lambda: server.poll() is not None or list((home / "runtime").glob("jpserver-*.json")),
            "JupyterLab",
        )
        assert server.poll() is None, log.read_text()
        yield folder, json.loads(files[0].read_text())["url"] + "lab/tree/{}?token=" + token
    finally:
        server.terminate()
        server.wait(60)


def field(browser, label: str, tag: str):
    """The element beside a widget's description."""
    return browser.find_element("xpath", f"//div[label[normalize-space()='{label}']]//{tag}")


def enter(browser, label: str, text: str) -> None:
    """Type into a widget, in place of what is there."""
    from selenium.webdriver import Keys

    box = field(browser, label, "input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text, Keys.ENTER)
