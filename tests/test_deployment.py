"""The notes on SLURM, as they stand on the page: their program runs, with commands in place of SLURM's that start batch jobs on this machine."""
import json
import os
import re
import subprocess
import sys

import psutil

SBATCH = """#!/bin/sh
copy=$(mktemp "$STAND_IN/job.XXXXXX")  # the script goes away when this command returns
cp "$1" "$copy"
setsid bash "$copy" >>"$STAND_IN/log" 2>&1 </dev/null &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -TERM -- -"$1"
"""


def notes(root, after: str) -> str:
    "The first block of Python under a heading of the page about clusters"
    cells = json.loads((root/'nbs/explanations/cluster.ipynb').read_text(encoding='utf-8'))['cells']
    text, = [source for cell in cells if (source := ''.join(cell['source'])).startswith(after)]
    return re.search('```python\n(.*?)```', text, re.DOTALL)[1]


def test_the_program_for_slurm(root, tmp_path):
    program = notes(root, '## On SLURM')
    for old, new in (("cores=16", "cores=2"), ("minimum_jobs=10, maximum_jobs=40", "minimum_jobs=1, maximum_jobs=1"), ('1_000_000', '12'), ('/local/scratch', str(tmp_path)),
                     ('/shared/sounds', str(tmp_path/'sounds'))):
        assert old in program
        program = program.replace(old, new)
    (tmp_path/'program.py').write_text(program)
    (tmp_path/'surge.yaml').write_text('samples_per_file: 4\nsample_rate: 16000\nduration_seconds: 0.5\n')
    for name, script in (('sbatch', SBATCH), ('scancel', SCANCEL)):
        (tmp_path/name).write_text(script)
        (tmp_path/name).chmod(0o755)
    environment = dict(os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}', STAND_IN=str(tmp_path),
                       PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]))
    done = subprocess.run([sys.executable, 'program.py'], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=150)
    assert done.returncode == 0, done.stderr
    for line in ('#SBATCH -p cpu', '#SBATCH -A my-project', '#SBATCH --cpus-per-task=2', '#SBATCH -t 04:00:00', f'export TMPDIR={tmp_path}'): assert f'{line}\n' in done.stdout
    assert re.search(r"--nthreads 2 .*--lifetime 225m --lifetime-stagger 10m", done.stdout)
    assert "'complete': True" in done.stdout and len([*tmp_path.glob('sounds/*.h5')]) == 3
    jobs = [process for process in psutil.process_iter(['environ']) if (process.info['environ'] or {}).get('STAND_IN') == str(tmp_path)]
    psutil.wait_procs(jobs, timeout=20)
    assert not [process for process in jobs if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
