"""A model at a URL: made on this disk, sent when it is whole, gone on with after trouble, and known again by any machine."""
import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_groove_train import command

from datatools.core import DatatoolsError, MismatchError, UsageError
from datatools.groove.events import GrooveConfig
from datatools.groove.files import FileList
from datatools.groove.model import GrooveModel
from datatools.groove.train import BadFile, Run, train_model
from datatools.jobs import InlineEngine
from datatools.remote import list_files, read_at
from datatools.testing import write_drum_corpus

CONFIG, QUIET = GrooveConfig(order=3), dict(show_progress=False, log_every=0)
ENGINES = dict(here=dict(), tasks=dict(engine=InlineEngine(), shards=4))


@pytest.fixture(params=['memory', 'file'])
def url(request, tmp_path, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    yield f'file://{tmp_path}/there/drums.groove' if request.param == 'file' else 'memory://there/drums.groove'
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = ['']


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    paths = write_drum_corpus(folder, 9)
    paths[6].write_bytes(paths[6].read_bytes()[:-30])
    return folder


def count(corpus, output, resume=False, config=CONFIG, engine='local', shards=None, **how):
    return train_model(FileList.from_directory(corpus), output, config, Run(resume=resume, **QUIET, **how), engine, shards)


def sent(url): return {name: read_at(remote.url) for name, remote in list_files(url.rpartition('/')[0]).items() if not name.startswith('.')}


@pytest.fixture
def expected(corpus, tmp_path):
    count(corpus, tmp_path/'drums.groove')
    return {name: (tmp_path/name).read_bytes() for name in ('drums.groove', 'drums.groove.skipped.jsonl')}


@pytest.mark.parametrize('engine', ENGINES)
def test_a_model_is_sent_when_it_is_whole(url, corpus, expected, tmp_path, monkeypatch, engine):
    with pytest.raises(BadFile): count(corpus, url, fail_fast=True, save_every=2, **ENGINES[engine])
    assert sent(url) == {}
    with pytest.raises(UsageError, match='--resume'): count(corpus, url, **ENGINES[engine])
    made = count(corpus, url, resume=True, **ENGINES[engine])
    assert (made['output'], made['skip_report']) == (url, f'{url}.skipped.jsonl') and made['processed'] < 9 and sent(url) == expected
    with pytest.raises(UsageError, match='where nothing is'): count(corpus, url, **ENGINES[engine])
    for machine in ('stage', 'another'):
        monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/machine))
        assert count(corpus, url, resume=True, **ENGINES[engine])['processed'] == 0
        assert GrooveModel.load(url).totals['kept'] == 8


def test_the_model_of_another_run_is_left_alone(url, corpus, expected, tmp_path, monkeypatch):
    count(corpus, url)
    write_drum_corpus(tmp_path/'other', 3)
    for machine in ('stage', 'another'):
        monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/machine))
        with pytest.raises(MismatchError, match='order'): count(corpus, url, resume=True, config=GrooveConfig(order=4))
        with pytest.raises(MismatchError, match='another file list'): count(tmp_path/'other', url, resume=True)
        with pytest.raises(MismatchError, match='another shard'): count(corpus, url, resume=True, num_shards=2)
    assert sent(url) == expected


def test_a_model_that_could_not_be_sent_is_kept(corpus, expected, tmp_path, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    url, put = 'memory://there/drums.groove', MemoryFileSystem.put_file
    def refuse(self, here, there, **more):
        if here.endswith('drums.groove'): raise ConnectionResetError('the line broke')
        return put(self, here, there, **more)
    monkeypatch.setattr(MemoryFileSystem, 'put_file', refuse)
    with pytest.raises(DatatoolsError, match='could not be sent.*the line broke'): count(corpus, url)
    assert [*sent(url)] == ['drums.groove.skipped.jsonl']
    monkeypatch.setattr(MemoryFileSystem, 'put_file', put)
    assert count(corpus, url, resume=True)['processed'] == 0 and sent(url) == expected
    MemoryFileSystem.store.clear()


def test_commands_with_a_model_at_a_url(corpus, expected, tmp_path, monkeypatch):
    for store in ('memory', 'memmap', 'sqlite'):
        monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/f'stage of {store}'))
        url = f'file://{tmp_path}/{store}/drums.groove'
        command('train', corpus, '-o', url, '--order', 3, '--store', store, '--log-every', 0)
        assert sent(url) == expected
    for shard in (0, 1): command('train', corpus, '-o', f'file://{tmp_path}/shards/{shard}', '--order', 3, '--shard-index', shard, '--num-shards', 2, '--log-every', 0)
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'another machine'))
    merge = 'merge', *(f'file://{tmp_path}/shards/{shard}' for shard in (1, 0)), '-o', f'file://{tmp_path}/merged/drums.groove'
    assert json.loads(command(*merge, '--json'))['output'] == merge[-1] and sent(merge[-1]) == expected
    assert 'where nothing is' in command(*merge, code=2)
    for name in ('info', 'stats', 'verify'): assert json.loads(command(name, url, '--json'))
    assert json.loads(command('eval', url, corpus, '--json'))['files'] == 8
    assert command('sample', url, '--json') == command('sample', tmp_path/'drums.groove', '--json')
    assert 'Nothing is there' in command('info', f'{url}.gone', code=2)
