"""A ledger that was cut or damaged: whole lines are kept, and nothing is thrown away unasked."""
import pytest
from hypothesis import given, settings, strategies as st

from datatools.core import DatatoolsError
from datatools.ledger import Ledger, TaskError, TaskResult

keys = st.text(max_size=8)
entries = st.dictionaries(keys, st.none() | st.integers() | st.text() | st.lists(st.integers(), max_size=3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(entries, st.data())
def test_a_ledger_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp('ledger')/'ledger.jsonl'
    with Ledger(path) as ledger:
        header = path.stat().st_size
        for key, value in written.items(): ledger.write(TaskResult(key, value))
    content = path.read_bytes()
    cut = data.draw(st.integers(header, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b'\n') - 1
    with Ledger(path) as ledger:
        assert list(ledger.places) == list(written)[:whole]
        for key in ledger.places: assert ledger.result(key).value == written[key]
        ledger.write(TaskResult('new key', error=TaskError('crash', 'x')))
    assert path.read_bytes().startswith(content[:cut].rpartition(b'\n')[0])


def test_a_damaged_ledger_is_refused(tmp_path):
    path = tmp_path/'ledger.jsonl'
    with Ledger(path) as ledger:
        for key in 'abc': ledger.write(TaskResult(key, 1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:2], b'rubbish\n', lines[3]]))
    with pytest.raises(DatatoolsError, match='line 3 is damaged'):
        with Ledger(path): pass
    assert b'rubbish' in path.read_bytes()
