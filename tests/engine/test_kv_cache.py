import torch
from torch import Tensor

from engine.kv_cache import KVCache, Shape, arena_lengths
from engine.sampling import SamplingParams
from engine.sequence import Sequence

SHAPE = Shape(layers=2, heads=3, width=4, dtype=torch.float32, device=torch.device("cpu"))


def made() -> Sequence:
    return Sequence((1,), SamplingParams(5, seed=0))


def filled(value: float, tokens: int) -> Tensor:
    return torch.full((2, 3, tokens, 4), value)


def stored(cache: KVCache, sequence: Sequence) -> tuple[Tensor, Tensor]:
    arena, row = cache.places[sequence]
    return arena.keys[:, row], arena.values[:, row]


def test_each_sequence_keeps_its_own_while_others_come_and_go() -> None:
    cache = KVCache(SHAPE, 256)
    sequences = [made() for _ in range(9)]
    for value, sequence in enumerate(sequences):
        cache.insert(sequence, filled(value, 10), filled(-value, 10))
    for leaving in (0, 8, 3):
        cache.free(sequences[leaving])
    assert cache.used == 6
    for value in (1, 2, 4, 5, 6, 7):
        keys, values = stored(cache, sequences[value])
        assert (keys[:, :, :10] == value).all()
        assert (values[:, :, :10] == -value).all()


def test_rows_of_an_arena_stay_dense() -> None:
    cache = KVCache(SHAPE, 256)
    sequences = [made() for _ in range(5)]
    for sequence in sequences:
        cache.insert(sequence, filled(1, 10), filled(1, 10))
    cache.free(sequences[1])
    cache.free(sequences[0])
    assert sorted(row for _, row in cache.places.values()) == [0, 1, 2]


def test_a_sequence_moves_on_when_it_outgrows_its_arena() -> None:
    cache = KVCache(SHAPE, 200)
    grows, stays = made(), made()
    for value, sequence in ((1.0, grows), (2.0, stays)):
        cache.insert(sequence, filled(value, 60), filled(value, 60))
    assert cache.reserve(grows, 64)[0].length == 64
    assert cache.reserve(grows, 65)[0].length == 96
    assert cache.reserve(grows, 200)[0].length == 200
    assert (stored(cache, grows)[0][:, :, :60] == 1).all()
    assert (stored(cache, stays)[0][:, :, :60] == 2).all()
    assert [len(arena.sequences) for arena in cache.arenas] == [0, 1, 0, 0, 0, 1]


def test_an_empty_arena_gives_its_memory_back_when_another_grows() -> None:
    cache = KVCache(SHAPE, 96)
    sequences = [made() for _ in range(5)]
    for sequence in sequences:
        cache.insert(sequence, filled(1, 20), filled(1, 20))
    for sequence in sequences:
        cache.reserve(sequence, 40)
        cache.free(sequence)
    assert rows_of(cache) == [8, 1, 0]
    kept = cache.arenas[0].both
    cache.insert(sequences[0], filled(2, 40), filled(3, 40))
    for sequence in sequences[1:]:  # no more than have left
        cache.insert(sequence, filled(1, 20), filled(1, 20))
    assert cache.arenas[0].both is kept
    for sequence in sequences[1:]:
        cache.free(sequence)
    cache.insert(made(), filled(1, 80), filled(1, 80))
    assert rows_of(cache) == [1, 1, 1]
    keys, values = stored(cache, sequences[0])
    assert (keys[:, :, :40] == 2).all()
    assert (values[:, :, :40] == 3).all()


def rows_of(cache: KVCache) -> list[int]:
    return [arena.both.shape[2] for arena in cache.arenas]


def test_arena_lengths_end_at_the_context() -> None:
    assert arena_lengths(20) == [20]
    assert arena_lengths(200) == [32, 64, 96, 128, 192, 200]
    assert arena_lengths(1024) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


def test_freeing_twice_or_what_was_never_stored_does_nothing() -> None:
    cache = KVCache(SHAPE, 64)
    sequence = made()
    cache.insert(sequence, filled(1, 5), filled(1, 5))
    cache.free(sequence)
    cache.free(sequence)
    cache.free(made())
    assert cache.used == 0


def test_what_is_tainted_is_wiped_wherever_it_lay() -> None:
    cache = KVCache(SHAPE, 64)
    sequences = [made() for _ in range(3)]
    for sequence in sequences:
        cache.insert(sequence, filled(torch.nan, 20), filled(torch.nan, 20))
    for sequence in sequences:
        cache.free(sequence, tainted=True)
    assert all(not arena.both.isnan().any() for arena in cache.arenas)
