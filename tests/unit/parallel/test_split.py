import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.parallel.split import shard_range


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_shares_cover_everything_once_in_order(count, size):
    shares = [range(*shard_range(count, rank, size)) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_known_split():
    assert [shard_range(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


@pytest.mark.parametrize(
    ("count", "rank", "size", "message"),
    [
        (-1, 0, 1, "count is -1"),
        (4, 4, 4, "rank is 4 of 4 ranks"),
        (4, -1, 4, "rank is -1 of 4 ranks"),
        (4, 0, 0, "rank is 0 of 0"),
    ],
)
def test_bad_arguments(count, rank, size, message):
    with pytest.raises(ValueError, match=message):
        shard_range(count, rank, size)
