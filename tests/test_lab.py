"""JupyterLab as a user meets it: `make lab`, a browser, Run All Cells, and a look at what the page shows."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright import sync_api

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / 'nbs/tutorials/analyse_dataset.ipynb'  # bars, tables, figures, players and worker processes, in half a minute
SETTINGS = {  # dark, so that colours that only suit a white page stand out; every cell in the page, not just those in sight
    'apputils-extension/themes': {'theme': 'JupyterLab Dark'},
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
    'notebook-extension/tracker': {'windowingMode': 'none'}}

# Runs in the page. A cell is [execution count, outputs]; an output is as in the file.
CELLS = '''() => [...jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type == 'code')
    .map(cell => [cell.executionCount, cell.outputs.toJSON()])'''
AT_REST = '''() => { const widget = jupyterapp.shell.currentWidget, kernel = widget.context.sessionContext.session?.kernel
    const cells = [...widget.content.model.cells].filter(cell => cell.type == 'code' && cell.sharedModel.source.trim())
    return kernel?.status == 'idle' && cells.every(cell => cell.executionState == 'idle')
        && (cells.every(cell => cell.executionCount) || cells.some(cell => cell.outputs.toJSON().some(o => o.output_type == 'error'))) }'''
PLAYERS = '''() => Promise.all([...document.querySelectorAll('.jp-OutputArea audio')].map(player => new Promise(done => {
    player.onloadedmetadata = () => done(player.duration); player.onerror = () => done(0); player.preload = 'auto'; player.load() })))'''
PICTURES = '''() => [...document.querySelectorAll('.jp-OutputArea img')].map(image => [image.naturalWidth, image.getBoundingClientRect().width])'''
PALE = '''() => {  // text of HTML outputs that can hardly be told from what is behind it: less than 3:1 (WCAG 2, contrast of large text)
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number)
    const light = colour => numbers(colour).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
    const behind = node => { for (; node; node = node.parentElement) { const colour = getComputedStyle(node).backgroundColor
        if ((numbers(colour)[3] ?? 1) > .5) return colour } return 'rgb(255, 255, 255)' }
    const pale = []
    for (const node of document.querySelectorAll('.jp-RenderedHTML *, .jp-OutputArea-output pre')) {
        if (![...node.childNodes].some(child => child.nodeType == 3 && child.textContent.trim())) continue
        const [a, b] = [light(getComputedStyle(node).color), light(behind(node))]
        if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 3) pale.push(node.textContent.trim().slice(0, 60)) }
    return pale }'''


@pytest.fixture(scope='module')
def chromium() -> str:
    "The system's Chromium; what playwright would download itself is not needed."
    for name in ('chromium', 'chromium-browser', 'google-chrome'):
        if found := shutil.which(name): return found
    reason = 'the browser tests need Chromium: apt-get install -y --no-install-recommends chromium'
    (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "`make lab` on a copy of the tutorial, for a user whose own kernel `python3` is broken; the address of the notebook."
    home = tmp_path_factory.mktemp('home')
    notebook = copied(tmp_path_factory.mktemp('notebooks'))
    broken = home / 'data/kernels/python3/kernel.json'
    broken.parent.mkdir(parents=True)
    broken.write_text(json.dumps(dict(argv=['false'], display_name='Broken', language='python')))
    for name, values in SETTINGS.items():
        path = home / f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = os.environ | dict(JUPYTER_DATA_DIR=str(home / 'data'), JUPYTER_PATH=str(home / 'data'), JUPYTER_PREFER_ENV_PATH='0',
                                    JUPYTER_RUNTIME_DIR=str(home / 'runtime'), JUPYTER_CONFIG_DIR=str(home / 'config'),
                                    JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'))
    command = ['make', 'lab', f'NB={notebook}', 'LAB_ARGS=--no-browser --port 0 --expose-app-in-browser',
               f'VENV={sys.prefix}', '-o', f'{sys.prefix}/.installed-dev']
    with open(home / 'log', 'w+') as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try: yield address(server, home, Path(notebook).name)
        finally:
            if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
            try: server.wait(20)
            except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def copied(folder: Path) -> Path:
    "A copy of the tutorial without its saved outputs."
    notebook = json.loads(TUTORIAL.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell.update(outputs=[], execution_count=None)
    path = folder / TUTORIAL.name
    path.write_text(json.dumps(notebook), encoding='utf-8')
    return path


def address(server: subprocess.Popen, home: Path, notebook: str) -> str:
    "Where the server that has just been started shows the notebook."
    for _ in range(300):
        if server.poll() is not None: break
        for path in home.glob('runtime/jpserver-*.json'):
            if text := path.read_text():
                facts = json.loads(text)
                return f'{facts["url"]}lab/tree/{notebook}?token={facts["token"]}'
        time.sleep(.2)
    pytest.fail(f'`make lab` started no server:\n{(home / "log").read_text()[-3000:]}')


@pytest.fixture(scope='module')
def page(lab, chromium, tmp_path_factory):
    "The tutorial in JupyterLab after Run > Run All Cells, when the kernel has come to rest."
    root = ['--no-sandbox'] if os.geteuid() == 0 else []
    quiet = ['--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-quic', '--no-first-run']
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*root, *quiet, '--disable-gpu'])
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.goto(lab, timeout=60_000)
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=60_000)
        page.wait_for_function('() => jupyterapp.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status == "idle"', timeout=60_000)
        page.locator('.lm-MenuBar-item', has_text='Run').click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        try: page.wait_for_function(AT_REST, timeout=240_000, polling=500)
        finally: page.screenshot(path=tmp_path_factory.mktemp('screen') / 'lab.png')
        yield page
        browser.close()


def test_every_cell_has_run_without_error(page):
    cells = page.evaluate(CELLS)
    outputs = [output for _, outputs in cells for output in outputs]
    assert [output for output in outputs if output['output_type'] == 'error'] == []
    assert [count for count, _ in cells] == list(range(1, len(cells) + 1))
    assert [output for output in outputs if output.get('name') == 'stderr'] == [], 'warnings, or bars that are no widgets'


def test_figures_are_visible(page):
    pictures = page.evaluate(PICTURES)
    assert len(pictures) > 10 and all(natural > 100 and shown > 100 for natural, shown in pictures)


def test_players_load(page):
    lengths = page.evaluate(PLAYERS)
    assert len(lengths) == 6 and all(length > .9 for length in lengths), lengths


def test_tables_and_bars_are_rendered(page):
    assert page.locator('.jp-RenderedHTML table').count() > 0
    bar = page.locator('.jp-OutputArea .jupyter-widgets', has_text='render').first
    assert bar.locator('.progress-bar-success').count() == 1 and '240/240' in bar.inner_text()


def test_text_can_be_read_on_a_dark_page(page):
    assert page.evaluate('() => document.body.dataset.jpThemeLight') == 'false', 'not the dark theme'
    assert page.evaluate(PALE) == []
