"""Every notebook alone in a fresh process: nbdev_test reuses its workers, so state of one can hide a fault of another.

And every notebook in a kernel, as "Run All Cells" does it in JupyterLab: there a cell can wait for what is asynchronous,
figures and bars are shown by other code than in a test, `__name__` is `'__main__'`, and no cell is left out, not even those
with `eval: false` and the closing `nbdev_export()`.
"""
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))


def run_alone(notebook: str) -> subprocess.CompletedProcess:
    "One notebook under nbdev_test, in a process that has run nothing else."
    command = [Path(sys.executable).parent / 'nbdev_test', '--path', notebook, '--n_workers', '0']
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope='module')
def runs(request):
    "All notebooks asked for, started two at a time."
    asked = {item.callspec.params['notebook'] for item in request.session.items
             if item.module is request.module and hasattr(item, 'callspec')}
    with ThreadPoolExecutor(2) as pool:
        yield {notebook: pool.submit(run_alone, notebook) for notebook in sorted(asked)}
        pool.shutdown(cancel_futures=True)


def test_a_notebook_that_hangs_is_named():
    code = "import time, run_nbdev_test as run; run.LIMIT = .2; run.limited(lambda name: time.sleep(60))('hangs.ipynb')"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'scripts', text=True, capture_output=True, timeout=50)
    assert done.returncode == 1 and done.stderr.startswith('hangs.ipynb has not ended') and 'in <lambda>' in done.stderr, done.stderr


@pytest.mark.drill  # `make test` runs them all before pytest, in workers that go on; this takes as long again
@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook_alone(notebook, runs):
    done = runs[notebook].result()
    assert done.returncode == 0, f'{notebook} fails when it runs alone:\n{done.stdout}\n{done.stderr}'


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the checkout, which the closing cells may export to, with the data beside it."
    folder = tmp_path_factory.mktemp('lab') / 'datatools'
    unwanted = shutil.ignore_patterns('.*', '__pycache__', '_docs', '_proc', 'build', 'dist', 'demo', '*.egg-info')
    shutil.copytree(ROOT, folder, ignore=unwanted, symlinks=True)
    if (ROOT.parent / 'shared').is_dir(): (folder.parent / 'shared').symlink_to(ROOT.parent / 'shared')
    return folder


@pytest.mark.drill
@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_run_all_in_a_kernel(notebook, copy, monkeypatch):
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')
    cells = nbformat.read(copy / notebook, as_version=4)
    exported = {path: path.read_bytes() for path in (copy / 'datatools').rglob('*.py')}
    NotebookClient(cells, timeout=600, kernel_name='python3', resources={'metadata': {'path': str((copy / notebook).parent)}}).execute()
    assert all(cell.execution_count for cell in cells.cells if cell.cell_type == 'code' and cell.source.strip())
    assert exported == {path: path.read_bytes() for path in (copy / 'datatools').rglob('*.py')}, 'the closing cell exported something else'
