"""Adds, merges, moves and reads dirty bitmaps with the public qemu.qmp client, as backup programs do.

Arguments: the control socket of a guest that writes to its disk `root`; the control socket of a process that waits
for it, and its address.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def connected(path):
    client = QMPClient("ferry-test")
    await client.connect(path)
    return client


async def main(path, other_path, address):
    client = await connected(path)

    async def run(command, **arguments):
        return await client.execute(command, arguments)

    async def refused(command, **arguments):
        try:
            await run(command, **arguments)
        except ExecuteError as error:
            assert error.error_class == "GenericError", error
            return str(error)
        raise AssertionError(f"{command} was not refused")

    async def bitmaps(client=client):
        for device in await client.execute("query-block"):
            if device["device"] == "root":
                return {each["name"]: each for each in device["inserted"].get("dirty-bitmaps", [])}

    async def sha256(name, client=client):
        arguments = {"node": "root", "name": name}
        return (await client.execute("x-debug-block-dirty-bitmap-sha256", arguments))["sha256"]

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

    # They move with the guest and its disk; one records all the time.
    await run("block-dirty-bitmap-add", node="root", name="recording", granularity=512)
    found = await bitmaps()
    digests = {name: await sha256(name) for name in found}
    wanted = [{"capability": name, "state": True} for name in ("events", "dirty-bitmaps", "block")]
    await run("migrate-set-capabilities", capabilities=wanted)
    statuses = []
    with client.listener(("MIGRATION",)) as events:
        await run("migrate", uri=address)
        while not statuses or statuses[-1] not in ("completed", "failed", "cancelled"):
            event = await asyncio.wait_for(events.get(), 20)
            statuses.append(event["data"]["status"])
    info = await run("query-migrate")
    assert statuses[-2:] == ["postcopy-active", "completed"] and "x-incomplete" not in info, (statuses, info)
    other = await connected(other_path)
    assert (await other.execute("query-status"))["status"] == "running"
    arrived = await bitmaps(other)
    assert set(arrived) == set(found) == {"b0", "b1", "all", "recording"}, arrived
    for name in ("b0", "b1", "all"):
        assert arrived[name] == found[name], (arrived, found)
        assert await sha256(name, other) == digests[name], name
    last = arrived["recording"]
    assert last["recording"] and not last["busy"] and last["granularity"] == 512, last
    assert last["count"] >= found["recording"]["count"], (last, found)
    # The guest goes on writing, and that is marked.
    await other.execute("block-dirty-bitmap-clear", {"node": "root", "name": "recording"})
    for _ in range(1000):
        if (await bitmaps(other))["recording"]["count"]:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("nothing is marked at the destination")
    for name in arrived:
        await other.execute("block-dirty-bitmap-remove", {"node": "root", "name": name})
    assert await bitmaps(other) == {}
    await other.disconnect()
    await client.disconnect()


asyncio.run(main(*sys.argv[1:]))
