"""The benchmark script measures what it says."""
import random, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent/'bench'))
import bench


def test_the_loop_draws_what_the_sampler_draws():
    random.seed(0)
    for _ in range(50):
        ids, positions = bench.loop_draw(list(range(640)), window=128, target=1024)
        assert len(ids) == len(positions) == 128 and positions[0] == 0 and positions[-1] < 1024
        assert all(b > a for a, b in zip(positions, positions[1:])) and all(b > a for a, b in zip(ids, ids[1:]))


def test_steps_take_turns():
    order = []
    bench.interleaved({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=3, warm=1)
    assert order == list('ab') * 4


def test_the_ratio_is_the_median_over_pairs(): assert bench.paired_ratio([2, 9, 4], [1, 3, 4]) == 2


def test_a_step_trains():
    step = bench.model_and_step('pose', 8, window=32, rows=2)
    step(); step()
