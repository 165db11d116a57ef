"""Drives a VMM with the public qemu.qmp client: greeting, commands, events, errors."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path):
    client = QMPClient("ferry-test")
    await client.connect(path)
    assert client.greeting is not None
    assert (await client.execute("query-status"))["status"] == "running"
    assert (await client.execute("query-name"))["name"] == "vm1"
    with client.listener(("STOP", "RESUME")) as events:
        await client.execute("stop")
        event = await asyncio.wait_for(events.get(), 20)
        assert event["event"] == "STOP" and "timestamp" in event, event
        assert (await client.execute("query-status"))["status"] == "paused"
        await client.execute("cont")
        event = await asyncio.wait_for(events.get(), 20)
        assert event["event"] == "RESUME", event
    await client.execute("migrate-set-parameters", {"downtime-limit": 42})
    parameters = await client.execute("query-migrate-parameters")
    assert parameters["downtime-limit"] == 42, parameters
    try:
        await client.execute("no-such-command")
        raise AssertionError("an unknown command was accepted")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
