-- wrk -s wrk.lua URL -- BODIES.jsonl: posts the file's lines in turn, over and over, and sums up in one line of JSON.
local bodies, at = {}, 0
local headers = {["Content-Type"] = "application/json"}

function init(args)
  for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
end

function request()
  at = at % #bodies + 1
  return wrk.format("POST", nil, headers, bodies[at])
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\nRESULT {"answers": %d, "seconds": %f, "mean_ms": %f, "p50_ms": %f, "p99_ms": %f, "refused": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency.mean / 1e3, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.status, e.connect + e.read + e.write + e.timeout))
end
