"""Ranges, sources and splits: what is refused, and that no file and no game is ever on both sides."""
import os

import numpy as np
import pytest

from datatools.core import FormatError, MismatchError, UsageError, rng_for
from datatools.pool.shards import RecordCodec, ShardDirectory, ShardWriter, finish_directory, write_shard
from datatools.pool.sources import check_separate, choose_groups, discover_and_split_multiple_data, find_shards, parse_range, shard_groups

CODEC = RecordCodec([('number', '<u4')])


def make(path, game_counts, rows_per_game=3, first_game=0, games=None, number=0):
    "A directory with so many games in each shard; or with the games given, per shard"
    games = games or np.split(first_game + np.arange(sum(game_counts)), np.cumsum(game_counts)[:-1])
    path.mkdir()
    for place, mine in enumerate(games):
        game = None if mine is None else np.repeat(mine, rows_per_game)
        rows = 3 if mine is None else len(game)
        write_shard(path/f'shard_{place:04d}.records', (np.arange(rows, dtype='<u4') + 1000 * place + number).view(CODEC.dtype), game, CODEC)
    finish_directory(path, CODEC)
    return path


def games_of(side): return {game for source in side for shard in source.shards for game in shard.games().tolist()}


@pytest.mark.parametrize('text, expected', [('all', range(7)), ('none', range(0)), ('0-0', range(1)), ('0-6', range(7)), ('2-4', range(2, 5)), ('006-6', range(6, 7))])
def test_ranges(text, expected): assert parse_range(text, 7) == expected


@pytest.mark.parametrize('text', ['', '3', '-3', '3-', '1-2-3', '1–2', '1 - 2', ' all', 'ALL', '1:2', '1-2\n', '१-२', '0x1-2', '1.0-2', None, 3, (1, 2), slice(1, 2), '9' * 30 + '-1'])
def test_malformed_ranges(text):
    with pytest.raises(UsageError, match="^my range=.*'all', 'none' or 'a-b'"): parse_range(text, 7, 'my range')


def test_ranges_out_of_order():
    with pytest.raises(UsageError, match="Turn it round: '2-5'"): parse_range('5-2', 7)
    with pytest.raises(UsageError, match="within the 7 shards that are there. '0-6' chooses all"): parse_range('5-7', 7)
    with pytest.raises(UsageError, match='within the 0 shards'): parse_range('0-0', 0)


def test_which_shards_a_range_means(tmp_path):
    path = make(tmp_path/'a', [1] * 12)
    chosen, = find_shards([path], ['9-10'])
    assert [shard.path.name for shard in chosen.shards] == ['shard_0009.records', 'shard_0010.records']
    with pytest.raises(UsageError, match=f'^shard_ranges=.* This is for {path}'): find_shards([path], ['9-12'])


def test_what_is_no_directory_of_shards(tmp_path):
    good, empty = make(tmp_path/'good', [2]), tmp_path/'empty'
    empty.mkdir()
    with pytest.raises(UsageError, match='does not exist'): find_shards([good, tmp_path/'missing'])
    with pytest.raises(FormatError, match='it is empty'): find_shards([empty])
    with pytest.raises(UsageError, match='at least one directory'): find_shards([])
    for value in ('a', tmp_path):
        with pytest.raises(UsageError, match='data_dirs.*a list. Write'): find_shards(value)
    with pytest.raises(UsageError, match='shard_ranges.*a list. Write'): find_shards([good], 'all')
    with pytest.raises(UsageError, match='one for each directory'): find_shards([good], [])
    shard = good/'shard_0000.records'
    shard.write_bytes(shard.read_bytes() + b'x')
    with pytest.raises(MismatchError, match='shard_0000.records has changed since its manifest'): find_shards([good])


def test_other_records_do_not_mix(tmp_path):
    other = RecordCodec([('number', '<u8')])
    with ShardWriter(tmp_path/'b', other) as writer: writer.append(np.zeros(3, other.dtype))
    with pytest.raises(MismatchError, match='hold different records'): find_shards([make(tmp_path/'a', [2]), tmp_path/'b'])


def test_one_file_by_two_ways(tmp_path):
    path = make(tmp_path/'a', [2, 2])
    (tmp_path/'symbolic').symlink_to(path)
    hard = tmp_path/'hard'
    hard.mkdir()
    for file in path.iterdir(): os.link(file, hard/file.name)
    for again in (path, tmp_path/'symbolic', hard, f'{path}/../a'):
        with pytest.raises(UsageError, match='are the same file'): find_shards([path, again])
    assert len(find_shards([path, hard], ['0-0', '1-1'])) == 2
    with pytest.raises(UsageError, match='are the same file'): find_shards([path, hard], ['0-1', '1-1'])


@pytest.mark.parametrize('weights', [None, 3, [0, 1], [-1, 1], [float('nan'), 1], [float('inf'), 1], ['a', 1], [True, 1], [1], [1, 1, 1], 'games', []])
def test_weights_that_are_refused(tmp_path, weights):
    with pytest.raises(UsageError, match='weights'): find_shards([make(tmp_path/'a', [2]), make(tmp_path/'b', [2])], weights=weights)


def test_other_things_than_directories(tmp_path):
    sources = find_shards([make(tmp_path/'a', [2])])
    for other in (sources[0], 3, None):
        with pytest.raises(UsageError, match='data_dirs=.* must be paths'): find_shards([tmp_path/'a', other])


def test_weights(tmp_path):
    dirs = [make(tmp_path/'a', [4, 4, 1]), make(tmp_path/'b', [3])]
    assert [source.weight for source in find_shards(dirs)] == [.75, .25]
    assert [source.weight for source in find_shards(dirs, weights='shards')] == [.75, .25]
    assert [source.weight for source in find_shards(dirs, ['0-0', 'all'], weights='shards')] == [.5, .5]
    assert [source.weight for source in find_shards(dirs, ['none', 'all'], weights=[5, 2])] == [0, 1]
    assert [source.weight for source in find_shards(dirs, weights=np.array([1, 3]))] == [.25, .75]


def brute_groups(games):
    "Connected components by repeated merging"
    labels = list(range(len(games)))
    for _ in games:
        for a in range(len(games)):
            for b in range(len(games)):
                if set(games[a]) & set(games[b]): labels[a] = labels[b] = min(labels[a], labels[b])
    return labels


@pytest.mark.parametrize('seed', range(15))
def test_groups_against_brute_force(tmp_path, seed):
    rng = rng_for(seed, 'groups')
    games = [rng.choice(60, rng.integers(1, 5), replace=False) for _ in range(14)]
    found, expected = shard_groups(ShardDirectory.open(make(tmp_path/'a', None, games=games)).shards), brute_groups(games)
    for a in range(14):
        for b in range(14): assert (found[a] == found[b]) == (expected[a] == expected[b])


@pytest.mark.parametrize('seed', range(15))
def test_no_game_on_both_sides(tmp_path, seed):
    rng = rng_for(seed, 'split')
    dirs = [make(tmp_path/f'd{d}', None, number=10_000 * d, games=[rng.choice(150, rng.integers(1, 4), replace=False) for _ in range(10)]) for d in range(3)]
    try: split = discover_and_split_multiple_data(dirs, seed=seed)
    except UsageError as error:
        assert 'Nothing can be put aside' in str(error)
        return
    assert not games_of(split.train) & games_of(split.validation)
    assert sum(len(source.shards) for side in (split.train, split.validation) for source in side) == 30
    assert all(source.rows for source in split.train) and sum(split.weights) == pytest.approx(1)
    check_separate(split.train, split.validation)


@pytest.mark.parametrize('fraction', [.05, .1, .2, .35, .5, .8])
def test_every_directory_gives_its_share(tmp_path, fraction):
    sizes = [[5] * 40, [2] * 20, [7, 3, 1, 9, 4, 6, 2, 8, 5, 5] * 3]
    dirs = [make(tmp_path/f'd{d}', counts, first_game=10_000 * d, number=10_000 * d) for d, counts in enumerate(sizes)]
    for seed in range(5):
        split = discover_and_split_multiple_data(dirs, validation_fraction=fraction, seed=seed)
        for train, validation, counts in zip(split.train, split.validation, sizes):
            assert abs(validation.rows / (train.rows + validation.rows) - fraction) <= max(counts) / sum(counts)


def test_the_split_depends_on_the_seed_alone(tmp_path):
    first, moved = make(tmp_path/'a', [5] * 30), make(tmp_path/'z', [5] * 30)
    names = [[shard.path.name for shard in discover_and_split_multiple_data([path], seed=seed).validation[0].shards] for path in (first, moved) for seed in (1, 2)]
    assert names[0] == names[2] and names[1] == names[3] and names[0] != names[1]


def test_small_directories(tmp_path):
    large, two, one = make(tmp_path/'large', [5] * 10), make(tmp_path/'two', [5, 5], first_game=500, number=1), make(tmp_path/'one', [5], first_game=900, number=2)
    split = discover_and_split_multiple_data([large, two, one])
    assert [len(source.shards) for source in split.train] == [8, 1, 1] and [len(source.shards) for source in split.validation] == [2, 1, 0]
    split = discover_and_split_multiple_data([two])
    assert [len(side[0].shards) for side in (split.train, split.validation)] == [1, 1]


def test_ranges_come_before_the_split(tmp_path):
    a, b = make(tmp_path/'a', [5] * 10), make(tmp_path/'b', [5] * 10, first_game=500, number=1)
    split = discover_and_split_multiple_data([a, b], ['0-4', 'none'])
    assert {shard.path.name for side in (split.train, split.validation) for shard in side[0].shards} == {f'shard_000{n}.records' for n in range(5)}
    assert split.weights == (1, 0) and not split.train[1].shards and not split.validation[1].shards


def test_nothing_to_divide(tmp_path):
    with pytest.raises(UsageError, match='a single shard cannot be divided .*/one.: make smaller ones, with rows_per_shard'): discover_and_split_multiple_data([make(tmp_path/'one', [5])])
    tied = make(tmp_path/'tied', None, games=[[1, 2], [2, 3], [3, 4]])
    with pytest.raises(UsageError, match='all shards are connected.*/tied.*group_by_game=True'): discover_and_split_multiple_data([tied])
    single = make(tmp_path/'single', [2], first_game=100, number=7)
    with pytest.raises(UsageError, match=r'a single shard cannot be divided \(\S*/single\).* And all shards are connected .* \(\S*/tied\)'): discover_and_split_multiple_data([tied, single])
    singles = [make(tmp_path/f'single{n}', [2], first_game=200 + 9*n, number=8 + n) for n in range(5)]
    with pytest.raises(UsageError, match='a single shard cannot be divided .*single2 and 2 more') as error: discover_and_split_multiple_data(singles)
    assert 'connected' not in str(error.value)
    for value in (0, 1, -1, 1.5, '0.2', None, float('nan')):
        with pytest.raises(UsageError, match='validation_fraction'): discover_and_split_multiple_data([tied], validation_fraction=value)


def test_copies_stay_together(tmp_path):
    a = make(tmp_path/'a', None, games=[None] * 6)
    b = make(tmp_path/'b', None, games=[None] * 6)  # the same bytes in other files
    groups = shard_groups([*ShardDirectory.open(a).shards, *ShardDirectory.open(b).shards])
    assert groups.tolist() == [*range(6)] * 2
    split = discover_and_split_multiple_data([a, b], seed=3)
    names = [{shard.path.name for source in side for shard in source.shards} for side in (split.train, split.validation)]
    assert not names[0] & names[1]


def test_overlap_of_two_lists(tmp_path):
    a, b = make(tmp_path/'a', [3, 3]), make(tmp_path/'b', None, number=1, games=[[100], [5, 101]])
    check_separate(find_shards([a]), find_shards([b], ['0-0']))
    with pytest.raises(UsageError, match='overlap: 1 games? .*a/shard_0001.records and .*b/shard_0001.records'): check_separate(find_shards([a]), find_shards([b]))
    with pytest.raises(UsageError, match='is the same file'): check_separate(find_shards([a]), find_shards([a], ['1-1']))
    for games in ([None, None], [[1], [2]]):  # copies, with and without games
        one, copy = (make(tmp_path/f'{name}{games[0]}', None, games=games, number=5) for name in ('one', 'copy'))
        with pytest.raises(UsageError, match='overlap: .*copy.*/shard_0001.records is a copy of .*one.*/shard_0001.records'): check_separate(find_shards([one]), find_shards([copy], ['1-1']))
    plain = make(tmp_path/'plain', None, games=[None, None])
    check_separate(find_shards([plain], ['0-0']), find_shards([plain], ['1-1']))


@pytest.mark.parametrize('seed', range(20))
def test_training_is_never_emptied(seed):
    rng = rng_for(seed, 'choose')
    rows = rng.integers(0, 50, (rng.integers(2, 9), rng.integers(1, 5))) * (rng.random((1, 1)) < .9)
    chosen = choose_groups(rows, .9, rng)
    assert ((rows[~chosen].sum(0) > 0) | (rows.sum(0) == 0)).all()


def test_many_shards_divide_quickly():
    rows = np.zeros((20_000, 4), int)
    rows[np.arange(20_000), np.arange(20_000) % 4] = 10
    chosen = choose_groups(rows, .2, rng_for(0))
    assert chosen.sum() == 4000
