from phikit.base.bandwidth import read_speeds


def test_one_figure_a_round():
    speeds = list(read_speeds(rounds=3, block_bytes=1 << 22))
    assert len(speeds) == 3
    assert all(1e6 < speed < 1e13 for speed in speeds)  # bytes a second, of no slow or magic memory
