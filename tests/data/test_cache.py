"""The cache: what is kept, what goes first, and that its size is bounded."""

from safegrpo_jax.data.cache import SizedCache


def test_the_least_recently_used_goes_first():
    cache, made = SizedCache(2), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"] and made == ["a", "b"]
    get("a")
    get("c")  # b has been idle longest
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]


def test_sizes_are_measured_and_a_value_beyond_the_whole_is_not_kept():
    cache, made = SizedCache(10), []

    def get(size):
        return cache.get(size, lambda: made.append(size) or bytes(size), len)

    assert [len(get(size)) for size in (4, 6, 4, 6)] == [4, 6, 4, 6] and made == [4, 6]
    get(1)  # 11 in all: 4 goes
    get(6)
    assert made == [4, 6, 1]
    assert len(get(11)) == 11
    get(11)
    get(6)  # what was there stays
    assert made == [4, 6, 1, 11, 11]
