"""The part of `agent_loop.testing.EngineSuite` about weights: new ones change the output and the stamp, or nothing at all."""

import asyncio

import numpy as np
import pytest

from agent_loop.engines.base import Engine
from agent_loop.errors import WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing_base import InFlight, Suite, catches, caught


class WeightSuite(Suite):
    """What they do to scores is in `EngineSuite` itself, pauses too; transfers in `CapabilitySuite`."""

    async def test_new_weights_change_the_output_and_the_stamp(self, engine: Engine) -> None:
        old = await self.greedy(engine)
        async with self.weights_restored(engine) as version:
            await engine.update_weights(self.new_weights(engine), version + 3)
            assert engine.version == version + 3
            assert await self.greedy(engine) != old
            response = await engine.generate([1, 1], SamplingParams(max_tokens=3, ignore_eos=True), request_id="stamped")
            assert response.versions.tolist() == [version + 3] * 3
        assert await self.greedy(engine) == old

    @catches
    async def test_an_update_in_flight_leaves_both_versions_in_order(self, engine: Engine) -> None:
        async with self.weights_restored(engine) as version:
            async with asyncio.TaskGroup() as tasks:
                call = await InFlight(tasks, engine, self.prompts(engine, 1)[0], self.long(), "in-flight").seen(2)
                await engine.update_weights(self.new_weights(engine), version + 1)
            versions = call.task.result().versions
            caught(set(versions.tolist()) != {version})
            assert set(versions.tolist()) == {version, version + 1}
            assert (np.diff(versions) >= 0).all()
            assert call.task.result().finish_reason == "length"

    async def test_a_lower_version_is_refused(self, engine: Engine) -> None:
        async with self.weights_restored(engine) as version:
            await engine.update_weights(self.original_weights(engine), version + 1)
            with pytest.raises(ValueError, match=str(version)):
                await engine.update_weights(self.new_weights(engine), version)
            with pytest.raises(ValueError, match="largest"):  # tokens could not carry it, and it could not be taken back
                await engine.update_weights(self.new_weights(engine), 2**31)
            assert engine.version == version + 1

    async def test_a_failed_update_leaves_the_old_weights_and_version(self, engine: Engine) -> None:
        old, version = await self.greedy(engine), engine.version
        with pytest.raises(WeightUpdateError):
            await engine.update_weights(self.broken_weights(engine), version + 1)
        assert engine.version == version
        assert await self.greedy(engine) == old
