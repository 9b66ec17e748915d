"""Legacy files: faulty examples, and conversions that are killed, resumed and compared byte for byte."""
import enum
import gzip
import pickle
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from datatools.core import FormatError, MismatchError, UsageError, read_json, rng_for
from datatools.pool import legacy
from datatools.pool.hex import HexCodec
from datatools.pool.legacy import convert
from datatools.pool.pickles import winner
from datatools.pool.shards import ShardDirectory

SIZE = 5


def game(rng, game_id=0, size=SIZE, metadata=True):
    "All positions of a random game"
    board, examples = np.zeros((2, size, size), np.float32), []
    for ply, cell in enumerate(rng.permutation(size * size)):
        if winner(board) >= 0: break
        policy = np.zeros(size * size, np.float32)
        policy[cell] = 1
        examples.append(dict(board=board.copy(), policy=policy, player_to_move=ply % 2))
        board[ply % 2].reshape(-1)[cell] = 1
    examples.append(dict(board=board, policy=None, player_to_move=len(examples) % 2))
    for position, example in enumerate(examples):
        example['value'] = int(winner(board))
        if metadata: example['metadata'] = dict(game_id=game_id, position_in_game=position, total_positions=len(examples))
    return examples


def write(path, examples, protocol=4, old_numpy=False):
    content = pickle.dumps({'examples': examples}, protocol)
    if old_numpy: content = renamed(content)
    path.write_bytes(gzip.compress(content, 1))
    return path


def renamed(content):
    "A pickle as NumPy 1 would have written it"
    assert b'numpy._core.multiarray' in content
    content = content.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')                # protocols 0 to 3
    new = b'\x8c\x15numpy.core.multiarray'
    while (place := content.find(b'\x8c\x16numpy._core.multiarray')) >= 0:                                # protocol 4: frames have lengths
        content = content[:place] + new + content[place + len(new) + 1:]
        frame = content.rfind(b'\x95', 0, place)
        length, = struct.unpack_from('<Q', content, frame + 1)
        content = content[:frame + 1] + struct.pack('<Q', length - 1) + content[frame + 9:]
    return content


@pytest.fixture
def examples(): return [example for number in range(4) for example in game(rng_for(1, number), number)]


@pytest.fixture
def legacy_program(monkeypatch):
    "The modules whose enumerations are in old files"
    found = {}
    for module, name in (('hex_ai.enums', 'Player'), ('hex_ai.enums', 'Winner'), ('hex_ai.value_utils', 'Player')):
        for part in ('hex_ai', module): monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
        kind = enum.Enum(name, dict(BLUE=0, RED=1), module=module, qualname=name)
        kind.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))
        setattr(sys.modules[module], name, kind)
        found[f'{module}.{name}'] = kind
    return found


# what examples may look like

@pytest.mark.parametrize('protocol', range(2, 5))
@pytest.mark.parametrize('old_numpy', [False, True])
def test_protocols_and_numpy_versions_agree(tmp_path, examples, protocol, old_numpy):
    made = convert(write(tmp_path/'a_processed.pkl.gz', examples, protocol, old_numpy), tmp_path/'out', workers=0)
    same = HexCodec(SIZE).decode(made.shards[0].records())
    assert np.array_equal(same['board'][:, :2].numpy(), np.stack([example['board'] for example in examples]))
    assert same['value'].ravel().tolist() == [example['value'] for example in examples]
    assert same['board'][:, 2, 0, 0].tolist() == [example['player_to_move'] for example in examples]


def test_enumerations_become_numbers(tmp_path, examples, legacy_program):
    players = [legacy_program['hex_ai.enums.Player'], legacy_program['hex_ai.value_utils.Player']]
    odd = [example | dict(value=legacy_program['hex_ai.enums.Winner'](example['value']), player_to_move=players[row % 2](example['player_to_move']))
           for row, example in enumerate(examples)]
    plain = convert(write(tmp_path/'a_processed.pkl.gz', examples), tmp_path/'plain', workers=0)
    named = write(tmp_path/'b_processed.pkl.gz', odd)
    for part in ('hex_ai', 'hex_ai.enums', 'hex_ai.value_utils'): del sys.modules[part]
    assert convert(named, tmp_path/'named', workers=0).fingerprint == plain.fingerprint
    assert 'hex_ai' not in sys.modules


def test_numpy_numbers_and_orders(tmp_path, examples):
    odd = [example | dict(board=np.asfortranarray(example['board'].astype('>f4')), value=np.float64(example['value']), player_to_move=np.int64(example['player_to_move']),
                          metadata=dict(game_id=np.int32(example['metadata']['game_id']), winner=np.str_('blue'), moves=np.arange(3))) for example in examples]
    odd = [example | dict(metadata=example['metadata'] | dict(position_in_game=0, total_positions=9)) for example in odd]
    plain, other = (convert(write(tmp_path/name, which), tmp_path/name[0], workers=0) for name, which in (('a.pkl.gz', examples), ('b.pkl.gz', odd)))
    assert plain.fingerprint == other.fingerprint


@pytest.mark.parametrize('content, message', [
    ({'examples': []}, 'holds no example'), ({'positions': [1]}, "a dictionary with 'positions'"), ([1, 2], 'a list, not a dictionary'),
    ({'examples': {1: 2}}, 'not a dictionary with a list'), ({'examples': [5]}, "no array under 'board'")])
def test_other_content(tmp_path, content, message):
    path = tmp_path/'a.pkl.gz'
    path.write_bytes(gzip.compress(pickle.dumps(content, 4)))
    with pytest.raises(FormatError, match=f'a.pkl.gz.*{message}'): convert(path, tmp_path/'out', workers=0)


FAULTS = [
    (lambda e: {k: v for k, v in e.items() if k != 'policy'}, "'policy' missing"),
    (lambda e: {k: v for k, v in e.items() if k not in ('value', 'player_to_move')}, "'value' and 'player_to_move' missing"),
    (lambda e: e | dict(metadata={}), "no 'game_id'"), (lambda e: e | dict(metadata=None), "no 'game_id'"), (lambda e: e | dict(metadata=dict(game_id={})), 'type dict'),
    (lambda e: e | dict(board=e['board'][:1]), r'shape \(1, 5, 5\), expected \(2, 5, 5\)'), (lambda e: e | dict(board=e['board'].astype(np.float64)), 'dtype float64'),
    (lambda e: e | dict(board=e['board'].tolist()), 'type list'), (lambda e: e | dict(board=None), 'type NoneType'),
    (lambda e: e | dict(policy=e['policy'][:-1]), r'policy has shape \(24,\)'), (lambda e: e | dict(policy=e['policy'] > 0), 'dtype bool'),
    (lambda e: e | dict(board=e['board'] + np.float32('nan')), 'not finite'), (lambda e: e | dict(policy=e['policy'] + np.float32('inf')), 'policy holds a number that is not finite'),
    (lambda e: e | dict(board=e['board'] * 2), 'board holds 2'), (lambda e: e | dict(board=np.broadcast_to(e['board'].max(0), (2, 5, 5)).copy()), 'both have a stone'),
    (lambda e: e | dict(player_to_move=1 - e['player_to_move']), 'is to move; blue begins'), (lambda e: e | dict(player_to_move=None), 'player_to_move is None'),
    (lambda e: e | dict(policy=e['policy'] * 0), 'sums to 0'), (lambda e: e | dict(policy=e['policy'] * 3), 'sums to 3'), (lambda e: e | dict(policy=-e['policy']), 'negative'),
    (lambda e: e | dict(policy=e['board'].max(0).ravel() / e['board'].sum()), 'occupied cell'), (lambda e: e | dict(policy=np.float32(.5) * (e['policy'] + np.roll(e['policy'], 1))), 'occupied|soft_policy=True'),
    (lambda e: e | dict(value=.5), r'value is 0\.5'), (lambda e: e | dict(value=-1), 'value is -1'), (lambda e: e | dict(value='blue'), "value is 'blue'"), (lambda e: e | dict(value=np.nan), 'value is nan'),
    (lambda e: e | dict(policy=None), 'nobody has won yet'), (lambda e: (e['board'], e['policy'], e['value']), 'a tuple among dictionaries'), (lambda e: 5, 'type int'),
]


@pytest.mark.parametrize('number', range(len(FAULTS)))
def test_every_fault_names_file_example_and_remedy(tmp_path, examples, number):
    spoil, message = FAULTS[number]
    path = write(tmp_path/'a.pkl.gz', [*examples[:6], spoil(examples[6]), *examples[7:]])
    with pytest.raises(FormatError, match=f'a.pkl.gz: example 6: .*(?:{message})') as error: convert(path, tmp_path/'out', workers=0)
    assert str(error.value).rstrip().endswith('.') and not (tmp_path/'out'/'manifest.json').exists()


def test_value_against_the_board(tmp_path):
    played = game(rng_for(3))
    played[-1] = played[-1] | dict(value=1 - played[-1]['value'])
    with pytest.raises(FormatError, match=f'example {len(played) - 1}: value is .* has won'): convert(write(tmp_path/'a.pkl.gz', played), tmp_path/'out', workers=0)


def test_soft_policies_only_on_request(tmp_path, examples):
    spread = np.full(SIZE * SIZE, 1 / SIZE / SIZE, np.float32)
    path = write(tmp_path/'a.pkl.gz', [examples[0] | dict(policy=spread)])
    with pytest.raises(FormatError, match='spread over 25 cells. Convert with soft_policy=True'): convert(path, tmp_path/'out', workers=0)
    dust = np.zeros(SIZE * SIZE, np.float32)
    dust[:2] = .9995, .0005
    nearly = write(tmp_path/'nearly.pkl.gz', [examples[0], examples[0] | dict(policy=dust)])
    with pytest.raises(FormatError, match='nearly.pkl.gz: example 1: policy is spread over 2 cells. Convert with soft_policy=True'): convert(nearly, tmp_path/'out2', workers=0)
    sharp = write(tmp_path/'b.pkl.gz', examples)
    convert(sharp, tmp_path/'sharp', workers=0)
    with pytest.raises(MismatchError, match='soft_policy'): convert(sharp, tmp_path/'sharp', soft_policy=True)
    with pytest.raises(MismatchError, match='board_size is 7'): convert(sharp, tmp_path/'sharp', board_size=7)
    made = convert(path, tmp_path/'soft', workers=0, soft_policy=True)
    assert np.allclose(made.codec.decode(made.shards[0].records())['policy'].numpy(), spread, atol=1e-3)


def test_any_error_names_its_file(tmp_path, monkeypatch, examples):
    def full(*arguments): raise OSError('no room')
    monkeypatch.setattr(legacy, 'write_shard', full)
    with pytest.raises(FormatError, match=r'/a\.pkl\.gz: .*no room'): convert(write(tmp_path/'a.pkl.gz', examples), tmp_path/'out', workers=0)


def test_blocks_count_examples_through(tmp_path, monkeypatch, examples):
    monkeypatch.setattr(legacy, 'BLOCK_ROWS', 7)
    bad = [*examples[:20], examples[20] | dict(value=9), *examples[21:]]
    with pytest.raises(FormatError, match='example 20: value'): convert(write(tmp_path/'a.pkl.gz', bad), tmp_path/'out', workers=0)


# the job

def many(folder, files=6, games=30, size=SIZE, shuffle=True):
    folder.mkdir()
    rng = rng_for(9, 'many')
    positions = [example for number in range(games) for example in game(rng, number, size)]
    order = rng.permutation(len(positions)) if shuffle else np.arange(len(positions))
    for number, rows in enumerate(np.array_split(order, files)): write(folder/f'shuffled_{number:04d}.pkl.gz', [positions[row] for row in rows])
    return positions


def content(directory): return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


@pytest.mark.parametrize('group', [True, False])
def test_same_bytes_for_any_number_of_workers(tmp_path, group):
    positions = many(tmp_path/'in')
    for workers in (0, 1, 2): convert(tmp_path/'in', tmp_path/f'out{workers}', workers=workers, rows_per_shard=100, group_by_game=group)
    first = content(tmp_path/'out0')
    assert sorted(first)[:2] == ['conversion.json', 'manifest.json'] and len(first) >= 6 and not any('.conversion' in name for name in first)
    assert content(tmp_path/'out1') == first and content(tmp_path/'out2') == first
    made = ShardDirectory.open(tmp_path/'out0')
    made.verify()
    assert len(made) == len(positions)
    pieces = sum(len(np.unique(shard.games())) for shard in made.shards)
    assert pieces == 30 if group else pieces > 60


def test_killed_and_resumed(tmp_path):
    positions = many(tmp_path/'in', files=12, games=600, size=7)
    code = f'from datatools.pool.legacy import convert; convert({str(tmp_path/"in")!r}, {str(tmp_path/"out")!r}, workers=0, rows_per_shard=500)'
    killed = 0
    for wait in (0, 1, 3):
        process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and len([*tmp_path.glob('out/.conversion/*.records')]) < wait + 1 and time.monotonic() < deadline: time.sleep(.001)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed
    resumed = convert(tmp_path/'in', tmp_path/'out', workers=0, rows_per_shard=500)
    convert(tmp_path/'in', tmp_path/'whole', workers=0, rows_per_shard=500)
    assert content(tmp_path/'out') == content(tmp_path/'whole') and len(resumed) == len(positions)


def test_killed_while_shards_are_written(tmp_path, monkeypatch):
    many(tmp_path/'in')
    calls = []
    def dying(self, records, game=None):
        calls.append(1)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(legacy.ShardWriter, 'append', dying)
        with pytest.raises(KeyboardInterrupt): convert(tmp_path/'in', tmp_path/'out', workers=0)
    assert calls and not (tmp_path/'out'/'manifest.json').exists()
    convert(tmp_path/'in', tmp_path/'out', workers=0)
    convert(tmp_path/'in', tmp_path/'whole', workers=0)
    assert content(tmp_path/'out') == content(tmp_path/'whole')


def test_only_what_is_left_is_done(tmp_path):
    positions = many(tmp_path/'in')
    sound = (tmp_path/'in'/'shuffled_0002.pkl.gz').read_bytes()
    (tmp_path/'in'/'shuffled_0002.pkl.gz').write_bytes(sound[:-30])
    write(tmp_path/'in'/'shuffled_0004.pkl.gz', [positions[0] | dict(value=7)])
    with pytest.raises(FormatError, match=r'2 of 6 files(?s:.*)0002.pkl.gz is a truncated(?s:.*)0004.pkl.gz: example 0: value is 7'): convert(tmp_path/'in', tmp_path/'out', workers=2)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path/'out'/'.conversion').glob('*.records')}
    assert len(parts) == 4
    (tmp_path/'in'/'shuffled_0002.pkl.gz').write_bytes(sound)
    with pytest.raises(FormatError, match='1 of 6 files'): convert(tmp_path/'in', tmp_path/'out', workers=0)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    (tmp_path/'in'/'shuffled_0004.pkl.gz').unlink()
    made = convert(tmp_path/'in', tmp_path/'out', workers=0)
    assert len(made.shards) == 1 and [file['name'][:13] for file in read_json(tmp_path/'out'/'conversion.json')['files']] == [f'shuffled_{n:04d}' for n in (0, 1, 2, 3, 5)]


def test_finished_directories_are_kept(tmp_path):
    many(tmp_path/'in')
    made = convert(tmp_path/'in', tmp_path/'out', workers=0)
    before = content(tmp_path/'out')
    assert convert(tmp_path/'in', tmp_path/'out', workers=0).fingerprint == made.fingerprint
    with pytest.raises(UsageError, match='resume=False'): convert(tmp_path/'in', tmp_path/'out', resume=False)
    for changed in (dict(rows_per_shard=7), dict(group_by_game=False), dict(game_ids='file'), dict(source_number=3)):
        with pytest.raises(MismatchError, match=next(iter(changed))): convert(tmp_path/'in', tmp_path/'out', **changed)
    write(tmp_path/'in'/'z_processed.pkl.gz', game(rng_for(5)))
    with pytest.raises(MismatchError, match='files'): convert(tmp_path/'in', tmp_path/'out')
    assert content(tmp_path/'out') == before
    (tmp_path/'out'/'conversion.json').unlink()
    with pytest.raises(UsageError, match='were not converted'): convert(tmp_path/'in', tmp_path/'out')


def test_files_must_agree(tmp_path, examples):
    small, large = write(tmp_path/'a.pkl.gz', examples), write(tmp_path/'b.pkl.gz', game(rng_for(2), size=6))
    old = write(tmp_path/'c.pkl.gz', [(example['board'], example['policy'], example['value']) for example in examples])
    with pytest.raises(FormatError, match=r'b.pkl.gz has boards of 6 × 6 cells, expected 5 × 5, as in'): convert([small, large], tmp_path/'o1', workers=0)
    with pytest.raises(FormatError, match='as board_size says'): convert([small], tmp_path/'o2', workers=0, board_size=6)
    with pytest.raises(FormatError, match="in one of them games are known.*game_ids='none'"): convert([small, old], tmp_path/'o3', workers=0)
    assert len(convert([small, old], tmp_path/'o4', workers=0, game_ids='none')) == 2 * len(examples)


def test_what_game_ids_name(tmp_path):
    files = [write(tmp_path/f'{name}.pkl.gz', game(rng_for(4, name), 0)) for name in 'ab']
    counts = {kind: read_json(convert(files, tmp_path/kind, workers=0, game_ids=kind).path/'conversion.json') for kind in ('global', 'file', 'none')}
    assert [counts[kind]['games'] for kind in counts] == [1, 2, None]
    assert [counts[kind]['games_in_several_files'] for kind in counts] == [1, 0, None]


def test_tuples_of_the_first_version(tmp_path, examples):
    path = write(tmp_path/'a.pkl.gz', [(example['board'], example['policy'], example['value']) for example in examples])
    made = convert(path, tmp_path/'out', workers=0)
    full = convert(write(tmp_path/'b.pkl.gz', examples), tmp_path/'full', workers=0, group_by_game=False)
    assert made.shards[0].games() is None and np.array_equal(made.shards[0].records(), full.shards[0].records())
    bad = write(tmp_path/'c.pkl.gz', [(examples[0]['board'], examples[0]['policy'])])
    with pytest.raises(FormatError, match='a tuple of 2'): convert(bad, tmp_path/'bad', workers=0)


def test_inputs(tmp_path, examples):
    folder = tmp_path/'in'
    folder.mkdir()
    with pytest.raises(UsageError, match='shuffled_NNNN'): convert(folder, tmp_path/'out')
    with pytest.raises(UsageError, match='at least one'): convert([], tmp_path/'out')
    with pytest.raises(UsageError, match='exists'): convert(tmp_path/'missing', tmp_path/'out')
    write(folder/'shuffled_0000.pkl.gz', examples)
    (folder/'shuffled_0001.pkl.gz').hardlink_to(folder/'shuffled_0000.pkl.gz')
    with pytest.raises(UsageError, match='same file as'): convert(folder, tmp_path/'out')
    (folder/'shuffled_0001.pkl.gz').unlink()
    (folder/'shuffled_0001.pkl.gz').symlink_to(folder/'shuffled_0000.pkl.gz')
    with pytest.raises(UsageError, match='same file as'): convert(folder, tmp_path/'out')
    for name, value in (('source_number', 256), ('source_number', True), ('game_ids', 'some'), ('rows_per_shard', 0), ('board_size', 1), ('workers', -1)):
        with pytest.raises(UsageError, match=name): convert(folder/'shuffled_0000.pkl.gz', tmp_path/'out', **{name: value})
