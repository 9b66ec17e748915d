"The demo as a newcomer meets it: one command, one page; killed anywhere and begun again, the same results to the byte."
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest

from datatools.demo import STAGES, DemoSettings, configuration
from datatools.testing import write_drum_corpus

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, '-c', 'from datatools.cli import main; main()', 'demo']
RESULTS = ('groove/*.groove', 'rhythms/*.mid', 'sounds/*.h5', 'spectra/audio/*.wav', 'spectra/*.lmdb/data.mdb', 'listener/listener.pt', 'positions/*/*.records',
           'mixture/mixture.svg', 'player/network.pt', *(f'{stage.name}.json' for stage in STAGES))


def demo(*words, code=0, timeout=240):
    "Run the command in a process of its own."
    done = subprocess.run([*COMMAND, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def content(folder, patterns=('**/*',)):
    "What the files of a folder hold, by name."
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name != '.lock'}
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The folder of a demo that nobody disturbed, and the summary it printed."
    out = tmp_path_factory.mktemp('finished')/'demo'
    return out, json.loads(demo('--out', out, '--quick', '--json').stdout)


class Page(HTMLParser):
    "What a page refers to and what is in it."
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [(tag, name, value) for name, value in attributes if name.rpartition(':')[2] in ('src', 'href', 'srcset', 'data', 'poster', 'action', 'background')]

    def handle_data(self, data): self.text += data


def test_the_page_is_complete(finished):
    out, summary = finished
    text = (out/'index.html').read_text(encoding='utf-8')
    page = Page(text)
    assert summary['page'] == str(out/'index.html') and summary['ran'] == len(STAGES) == len(summary['stages'])
    for tag, name, value in page.addresses: assert value.startswith(('data:', '#')), f'{tag} {name}={value[:80]}'
    assert not {'script', 'link', 'iframe', 'object', 'embed'} & {*page.tags}
    assert not re.search(r'url\((?!["\']?#)|@import', text), 'a style refers to something outside'
    assert page.tags.count('audio') == 3 + 6 and page.tags.count('svg') == 8 and page.tags.count('table') == 2
    assert f"{summary['stages']['groove']['bits_per_onset']:.2f} bits" in page.text and 'very small sizes' in page.text
    for stage in STAGES: assert stage.name in page.text and summary['stages'][stage.name]['runs'] == 1 and summary['stages'][stage.name]['seconds'] > 0
    assert len(text) < 6e6 and str(ROOT) not in text and str(out) not in text


def test_a_second_run_does_nothing(finished):
    out, _ = finished
    before = content(out)
    begun = time.perf_counter()
    done = demo('--out', out, '--quick')
    assert time.perf_counter() - begun < 30
    assert done.stdout.count('finished before') == len(STAGES) and done.stdout.splitlines()[-1].endswith(str(out/'index.html'))
    assert content(out) == before


def test_killed_and_resumed_with_files_of_the_user(finished, tmp_path):
    "The same loops as files of the user, and a demo that is killed, interrupted and left to finish: the results are the same."
    out, summary = finished
    quick = DemoSettings(quick=True)
    write_drum_corpus(tmp_path/'mine', quick.sizes['loops'], quick.part('drums'))
    words = ('--out', tmp_path/'demo', '--quick', '--midi', tmp_path/'mine')
    for sign, stop, code in (('sounds/*.partial', signal.SIGKILL, -9), ('listener/checkpoint.pt', signal.SIGINT, 130)):
        process = subprocess.Popen([*COMMAND, *map(str, words)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and not any((tmp_path/'demo').glob(sign)) and time.monotonic() < deadline: time.sleep(.02)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, stop)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert not psutil.wait_procs(children, timeout=10)[1], 'something goes on in the background'
    assert said == 'Interrupted. What has finished is safe: the same command goes on from there.\n'
    assert not (tmp_path/'demo/index.html').exists()
    done = demo(*words)
    assert 'rhythms   finished before' in done.stdout and re.search(r'^listener .* resumed$', done.stdout, re.M)
    assert content(tmp_path/'demo', RESULTS) == content(out, RESULTS)
    assert 'your MIDI files' in (tmp_path/'demo/index.html').read_text(encoding='utf-8') and not [*(tmp_path/'demo/drums').glob('*.mid')]
    wrong = demo('--out', tmp_path/'demo', '--quick', code=1)
    assert "drums: '" in wrong.stderr and "'made here' asked for" in wrong.stderr


def test_wrong_usage_is_one_line_and_leaves_nothing(finished, tmp_path):
    out, _ = finished
    for number in range(3): shutil.copy(out/'rhythms/rhythm-00.mid', tmp_path/f'{number}.mid')
    for words, message in ((('--midi', tmp_path/'nowhere'), 'nowhere'), (('--midi', tmp_path), 'a folder with 10 or more files named .mid or .midi. It has 3.'),
                           (('--plugin', tmp_path/'none.vst3'), '--plugin='), (('--workers', 0), '--workers=0')):
        said = demo('--out', tmp_path/'demo', '--quick', *words, code=2).stderr
        assert said.startswith('Error: ') and message in said and said.count('\n') == 1
    assert not (tmp_path/'demo').exists()
    assert '--output-dir=' in demo('--out', tmp_path, code=2).stderr, 'a folder that holds something else'
    other = demo('--out', out, '--quick', '--seed', 1, code=1).stderr
    assert 'was made with another configuration' in other and 'seed: 0 on disk, 1 asked for' in other


def test_drums_without_drums_are_named(tmp_path):
    import mido
    for number in range(10):
        mido.MidiFile(tracks=[mido.MidiTrack([mido.Message('note_on', channel=0, note=60, time=0), mido.Message('note_off', channel=0, note=60, time=480)])]).save(tmp_path/f'{number}.mid')
    said = demo('--out', tmp_path/'demo', '--quick', '--midi', tmp_path, code=1).stderr
    assert said.startswith('Error: Stage groove failed: ') and 'there are no drums' in said and said.count('\n') == 1


def test_the_command_loads_nothing_before_it_is_asked(python):
    code = "import sys; from datatools.demo import app; print(sorted({'torch', 'numba', 'h5py', 'lmdb', 'matplotlib', 'pedalboard', 'mido'} & {*sys.modules}))"
    assert python('-c', code).stdout.strip() == '[]'


def test_the_corpus_is_known_by_its_content(tmp_path):
    write_drum_corpus(tmp_path/'a', 10)
    shutil.copytree(tmp_path/'a', tmp_path/'b')
    first, second = (configuration(DemoSettings(midi=str(tmp_path/name))) for name in 'ab')
    assert first == second
    (tmp_path/'b/loop-0003.mid').write_bytes((tmp_path/'b/loop-0004.mid').read_bytes())
    assert configuration(DemoSettings(midi=str(tmp_path/'b'))) != first
