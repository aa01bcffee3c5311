"""What the package is asked before it is published: `pytest` in its folder, with the package installed."""

from lora_lite_scale import ScaleConfig

from lora_lite_core.testing import variant_checks


@variant_checks(ScaleConfig(block=8))
def test_scale(check):
    check()
