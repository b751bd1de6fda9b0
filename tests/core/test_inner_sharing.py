"""jbn._core.sharing: if more than FEW places share statistics, two small sums are sent instead of all parts."""

import jax
import pytest
from support.sent import FEATURES, LAYERS, jbn_layer, sent_by_network
from support.whole_batch import assert_each_batch_is_whole, built, each

from jbn._core import sharing


@pytest.fixture(scope="module", autouse=True)
def two_sums():
    """Clears caches before and after, because other tests trace and cache the form for few places."""
    caches = (built.cache_clear, sent_by_network.cache_clear, jax.clear_caches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "FEW", 0)
        for clear in caches:
            clear()
        yield
    for clear in caches:
        clear()


@each("shard_map, unchecked, even groups", "shard_map, uneven groups", "vmap, even groups")
def test_two_sums_give_the_statistics_of_the_whole_batch(rng, case):
    assert_each_batch_is_whole(rng, case, "float32", [("an empty part", 1e4), ("nothing", 3)])


@each("shard_map, two axes, relu")
def test_two_sums_without_a_mask_give_the_statistics_of_the_whole_batch(rng, case):
    assert_each_batch_is_whole(rng, case, "float32", [("all", 1e4)])


@pytest.mark.devices(8)
@pytest.mark.cpu
def test_two_small_sums_are_sent_a_layer():
    forward, backward = sent_by_network(jbn_layer, "devices", "rows", masked=True)
    assert sorted(set(forward)) == [f"f32[{2 * FEATURES}]", f"f32[{FEATURES + 1}]"]
    assert (len(forward), len(backward)) == (2 * LAYERS, LAYERS)
