"""Adds, merges and reads dirty bitmaps with the public qemu.qmp client, as backup programs do."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path):
    client = QMPClient("ferry-test")
    await client.connect(path)

    async def run(command, **arguments):
        return await client.execute(command, arguments)

    async def refused(command, **arguments):
        try:
            await run(command, **arguments)
        except ExecuteError as error:
            assert error.error_class == "GenericError", error
            return str(error)
        raise AssertionError(f"{command} was not refused")

    async def bitmaps():
        for device in await run("query-block"):
            if device["device"] == "root":
                return {each["name"]: each for each in device["inserted"].get("dirty-bitmaps", [])}

    async def sha256(name):
        answer = await run("x-debug-block-dirty-bitmap-sha256", node="root", name=name)
        return answer["sha256"]

    await run("block-dirty-bitmap-add", node="root", name="b0")
    await run("block-dirty-bitmap-add", node="root", name="b1", granularity=4096)
    for _ in range(1000):
        if (await bitmaps())["b0"]["count"]:
            break
        await asyncio.sleep(0.01)
    found = await bitmaps()
    assert found["b0"]["count"] > 0 and found["b0"]["granularity"] == 65536, found
    assert found["b0"]["recording"] and not found["b0"]["busy"], found
    # One moment at which b0 stops and its successor starts.
    named = [{"node": "root", "name": name} for name in ("b0", "b1")]
    await run("transaction", actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "root", "name": "all", "disabled": True}},
        {"type": "block-dirty-bitmap-disable", "data": named[0]},
        {"type": "block-dirty-bitmap-disable", "data": named[1]},
    ])
    assert await sha256("all") != await sha256("b0")
    await run("block-dirty-bitmap-merge", node="root", target="all", bitmaps=["b0", named[1]])
    # b1 has nothing that b0 has not: it was added later, and its granules are finer.
    assert await sha256("all") == await sha256("b0")
    found = await bitmaps()
    assert found["all"]["count"] == found["b0"]["count"] >= found["b1"]["count"], found
    text = await refused("transaction", actions=[
        {"type": "block-dirty-bitmap-remove", "data": named[0]},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "root", "name": "nope"}},
    ])
    assert text == "Dirty bitmap 'nope' not found", text
    assert await bitmaps() == found
    for name in found:
        await run("block-dirty-bitmap-remove", node="root", name=name)
    assert await bitmaps() == {}
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
