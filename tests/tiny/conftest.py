import pytest


@pytest.fixture(scope="module")
def small_shards():
    """Shards of 16 scenes instead of 512, for a whole file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("shards", "batches", "vision_pretraining"):
            patch.setattr(f"paligemma.tiny.recipe.{module}.SHARD", 16)
        yield
