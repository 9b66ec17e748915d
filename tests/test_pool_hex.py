"""Properties of the Hex codec, the rules and the solver that must hold for any position of any size."""
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datatools.core import FormatError, UsageError, hash_file, rng_for
from datatools.pool.codecs import codec_from_facts
from datatools.pool.hex import HexBoard, HexCodec, symmetry_cells, winner_of
from datatools.pool.play import GameSource, make_shards, play_games, solve, winning_moves

sizes = st.integers(2, 26)
quick = settings(max_examples=40, deadline=None)


def positions(size, rows, rng):
    "Stones at random, in equal numbers or with one more of blue, a free cell as policy unless the board is full"
    cells, stones = size*size, rng.integers(0, size*size + 1, rows)
    order = rng.permuted(np.tile(np.arange(cells), (rows, 1)), axis=1)
    board = np.zeros((rows, 2, cells), bool)
    for row, count in enumerate(stones):
        board[row, 0, order[row, :(count + 1)//2]] = True
        board[row, 1, order[row, (count + 1)//2:count]] = True
    policy = np.where(stones < cells, order[np.arange(rows), np.minimum(stones, cells - 1)], -1)
    return board.reshape(rows, 2, size, size), policy, rng.integers(0, 2, rows)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ('board', 'policy', 'value'))


@quick
@given(sizes, st.integers(0, 2**32), st.booleans(), st.sampled_from(['dense', 'index']))
def test_round_trip(size, seed, soft, policy):
    codec = HexCodec(size, soft_policy=soft, policy=policy)
    board, cell, value = positions(size, 9, rng_for(seed, 'round trip'))
    records = codec.encode(board, cell, value, source=7)
    codec.check(records)
    batch = codec.decode(records)
    assert (batch['board'][:, :2].numpy() != 0).tolist() == board.tolist()
    assert batch['value'].ravel().tolist() == value.tolist()
    found = batch['policy'].numpy() if policy == 'index' else np.where(batch['policy'].any(1), batch['policy'].argmax(1), -1)
    assert found.tolist() == cell.tolist()
    assert codec.encode(batch['board'], batch['policy'], batch['value'], 7).tobytes() == records.tobytes()
    assert codec_from_facts(codec.facts()).dtype == codec.dtype


@quick
@given(sizes, st.integers(0, 2**32), st.integers(0, 3), st.integers(0, 3))
def test_symmetries_are_a_group(size, seed, one, other):
    codec = HexCodec(size)
    records = codec.encode(*positions(size, 5, rng_for(seed, 'group')))
    first = codec.decode(records, np.full(5, one))
    again = codec.encode(first['board'], first['policy'], first['value'])
    assert same(codec.decode(again, np.full(5, other)), codec.decode(records, np.full(5, one ^ other)))


@quick
@given(st.integers(2, 15), st.integers(0, 2**32))
def test_a_reflected_game_is_won_by_the_other_colour(size, seed):
    codec = HexCodec(size)
    records, _ = play_games(2, codec, rng_for(seed, 'reflected'), skill=0.)
    final = np.repeat(records[records['policy'] == codec.no_policy], 4)
    batch = codec.decode(final, np.arange(8) % 4)
    for board, value in zip(batch['board'].numpy(), batch['value'].ravel().tolist()):
        assert winner_of((board[0] + 2*board[1]).astype(np.int8).ravel(), size) == 1 + value


@quick
@given(sizes, st.integers(0, 2**32))
def test_output_is_what_it_is_and_nothing_around_it(size, seed):
    rng = rng_for(seed, 'around')
    codec, rows = HexCodec(size), 6
    records = codec.encode(*positions(size, rows, rng))
    symmetry = rng.integers(0, 4, rows)
    expected = codec.decode(records, symmetry)
    room = {name: torch.full((tensor.numel() + 64,), 7.) for name, tensor in expected.items()}
    out = {name: room[name][32:-32].view(tensor.shape) for name, tensor in expected.items()}
    assert same(codec.decode(records, symmetry, out), expected) and same(out, expected)
    assert all((tensor[:32] == 7).all() and (tensor[-32:] == 7).all() for tensor in room.values())


def test_soft_policies_move_with_the_cells():
    codec, rng = HexCodec(6, soft_policy=True), rng_for(0, 'soft')
    soft = rng.dirichlet(np.ones(36), 4).astype(np.float16)
    records = codec.encode(np.zeros((4, 2, 6, 6)), soft)
    codec.check(records)
    moved = codec.decode(records, np.arange(4))['policy'].numpy()
    for number, cells in enumerate(symmetry_cells(6)): assert (moved[number][cells] == soft[number]).all()
    records['soft_policy'][2] *= 2
    with pytest.raises(FormatError, match='row 2: soft_policy does not sum to 1'): codec.check(records)
    records['soft_policy'][1, 3] = np.nan
    with pytest.raises(FormatError, match='row 1: soft_policy is not finite'): codec.check(records)


def test_read_only_and_empty_blocks():
    codec = HexCodec(13)
    records, _ = play_games(2, codec)
    frozen = records.copy()
    frozen.flags.writeable = False
    assert same(codec.decode(frozen), codec.decode(records)) and same(codec.decode(records[::2]), codec.decode(records[::2].copy()))
    assert codec.decode(records[:0])['board'].shape == (0, 3, 13, 13)
    codec.check(records[:0])
    codec.check(frozen)


@pytest.mark.parametrize('arguments', [dict(symmetry=[0, 4]), dict(symmetry=[0]), dict(symmetry=[0, -1]), dict(symmetry=[.5, 0]),
                                       dict(out=dict(board=torch.empty(2, 3, 13, 12))), dict(out=dict(value=torch.empty(2, 1, dtype=torch.float64))),
                                       dict(out=dict(board=torch.empty(3, 2, 13, 13).transpose(0, 1)))])
def test_wrong_arguments_are_refused(arguments):
    codec = HexCodec(13)
    with pytest.raises(UsageError): codec.decode(np.zeros(2, codec.dtype), **arguments)
    with pytest.raises(UsageError): codec.decode(np.zeros(2, HexCodec(12).dtype))


@pytest.mark.parametrize('arguments, name', [(dict(value=[0, -1]), 'value=-1'), (dict(value=.5), 'value=0.5'), (dict(value=[float('nan'), 0]), 'value=nan'),
    (dict(value=[0, 1, 1]), "value='3 numbers"), (dict(source=300), 'source=300'), (dict(source=[0, -1]), 'source=-1'), (dict(source=.5), "source='float64"),
    (dict(source=[1, 2, 3]), 'source=')])
def test_only_zeros_and_ones_are_encoded(arguments, name):
    codec = HexCodec(5)
    with pytest.raises(UsageError, match=name): codec.encode(np.zeros((2, 2, 5, 5)), **arguments)
    with pytest.raises(UsageError, match='board=0.3'): codec.encode(np.full((2, 2, 5, 5), .3))
    assert codec.encode(np.zeros((2, 2, 5, 5)), value=torch.tensor([[True], [False]]), source=[3, 255])['flags'].tolist() == [2, 0]


@lru_cache(None)
def brute_force(size, cells, colour):
    "Whether `colour`, whose move it is, wins, by trying everything"
    if winner := winner_of(np.array(cells, np.int8), size): return winner == colour
    return any(not brute_force(size, cells[:cell] + (colour,) + cells[cell + 1:], 3 - colour) for cell, stone in enumerate(cells) if stone == 0)


@settings(max_examples=400, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9))
def test_the_solver_agrees_with_brute_force(order, stones):
    board = HexBoard(3, tuple(order[:stones]))
    wins = brute_force(3, tuple(board.cells.tolist()), board.to_move)
    assert solve(board) == (board.to_move if wins else 3 - board.to_move)
    assert bool(winning_moves(board)) == (wins and not board.winner)


@settings(max_examples=150, deadline=None)
@given(st.permutations(range(16)), st.integers(7, 16))
def test_the_solver_agrees_with_brute_force_on_16_cells(order, stones):
    board = HexBoard(4, tuple(order[:stones]))
    wins = brute_force(4, tuple(board.cells.tolist()), board.to_move)
    assert solve(board) == (board.to_move if wins else 3 - board.to_move)


def test_shards_do_not_depend_on_workers_or_interruptions(tmp_path):
    sources, codec = [GameSource('weak', 30, 0.), GameSource('strong', 20, .9)], HexCodec(5)

    def bytes_of(name, workers):
        made = make_shards(tmp_path/name, sources, codec, games_per_shard=8, seed=1, workers=workers)
        return [hash_file(shard.path) for directory in made for shard in directory.shards]

    whole = bytes_of('whole', 0)
    assert bytes_of('workers', 2) == whole
    lines = (tmp_path/'workers'/'make_shards.ledger').read_bytes().splitlines(keepends=True)
    (tmp_path/'workers'/'make_shards.ledger').write_bytes(b''.join(lines[:3]))  # as after a kill
    (tmp_path/'workers'/'strong'/'shard_0001.records').unlink()
    for manifest in (tmp_path/'workers').rglob('manifest.json'): manifest.unlink()
    assert bytes_of('workers', 1) == whole
