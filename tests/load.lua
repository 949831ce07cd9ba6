-- For wrk: what tests/test_hot_restart.py wants to know, as one line.

-- Milliseconds between the requests of a connection (WRK_DELAY): a load that leaves some of the processor to what is restarted.
local pause = tonumber(os.getenv("WRK_DELAY") or "0")
if pause > 0 then
  function delay()
    return pause
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    "load requests=%d connect=%d read=%d write=%d status=%d timeout=%d slowest_us=%d\n",
    summary.requests, errors.connect, errors.read, errors.write, errors.status, errors.timeout, latency.max))
end
