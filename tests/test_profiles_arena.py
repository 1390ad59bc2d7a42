"""The model of onnxruntime's arena, on hand-worked orders of requests."""

from profiles.arena import Arena

MIB = 2**20


def test_the_same_buffer_serves_again():
    """Taken, given back and taken again: the bytes are resident once."""
    arena = Arena()
    for _ in range(10):
        arena.give_back(arena.take(3 * MIB))

    assert arena.written_bytes == 3 * MIB


def test_untouched_bytes_are_reserved_and_not_resident():
    """3 MiB need a region of 4; the fourth is never written."""
    arena = Arena()
    arena.take(3 * MIB)

    assert (arena.written_bytes, arena.reserved_bytes) == (3 * MIB, 4 * MIB)


def test_a_region_has_a_table_beside_it():
    """A pointer for each 256 bytes, written whole: 4 MiB with one MiB of buffers hold 128 KiB more."""
    arena = Arena(4 * MIB)
    arena.take(MIB)

    assert arena.resident_bytes == MIB + 4 * MIB // 32


def test_the_newest_of_equal_regions_is_taken():
    """Linux maps each region below the one before, and the arena takes the lowest of equal chunks."""
    arena = Arena()
    older, newer = arena.take(3 * MIB), arena.take(3 * MIB)
    arena.give_back(older)
    arena.give_back(newer)

    assert arena.take(3 * MIB).region == newer.region


def test_a_chunk_is_split_only_from_twice_its_size():
    """600 KiB of 1 MiB leave the rest unusable; 500 KiB leave room for 500 more."""
    roomy, tight = Arena(), Arena()
    for _ in range(2):
        roomy.take(500 * 1024)
        tight.take(600 * 1024)

    assert (roomy.reserved_bytes, tight.reserved_bytes) == (1 * MIB, 3 * MIB)


def test_neighbours_join_when_they_are_free():
    """Four quarters given back in any order hold a whole again."""
    arena = Arena()
    quarters = [arena.take(MIB // 4) for _ in range(4)]
    for place in (2, 0, 3, 1):
        arena.give_back(quarters[place])
    arena.take(MIB)

    assert arena.reserved_bytes == MIB


def test_holes_make_more_resident_than_lives():
    """Small buffers that stay cut up the region: a large one must go elsewhere, though enough is free."""
    arena = Arena()
    pieces = [arena.take(MIB // 4) for _ in range(4)]
    for piece in pieces[::2]:
        arena.give_back(piece)
    arena.take(MIB // 2)

    assert arena.written_bytes == MIB + MIB // 2


def test_regions_double():
    """1, 2, 4, 8 MiB: each further region is twice the last one."""
    arena = Arena()
    for size in (1, 2, 4, 8):
        arena.take(size * MIB)
        assert arena.reserved_bytes == (2 * size - 1) * MIB


def test_the_smallest_chunk_that_fits_is_taken():
    """A request of 1 MiB goes into the freed 1 MiB, not into the freed 4."""
    arena = Arena()
    small, large = arena.take(MIB), arena.take(4 * MIB)
    arena.give_back(large)
    arena.give_back(small)

    assert arena.take(MIB).region == small.region
