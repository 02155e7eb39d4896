-- wrk -s requests.lua URL -- METHOD STATUS NAME: send METHOD, and count every answer that has another status than STATUS, or
-- that ends its connection: wrk would open another, and say nothing of what that took. What is stored is called after
-- NAME, which no other run may have.
local threads = {}
wrong = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  expected = tonumber(arguments[2])
  local prefix, number = arguments[3], 0
  if arguments[1] == "POST" then
    -- Each request stores another patient.
    local headers = { ["content-type"] = "application/json" }
    local body = '{"mrn":"B%s-%d","full_name":"Ada Example","birth_date":"1980-05-17"}'
    request = function()
      number = number + 1
      return wrk.format("POST", nil, headers, string.format(body, prefix, number))
    end
  end
end

function response(status, headers)
  if status ~= expected or headers["connection"] == "close" or headers["Connection"] == "close" then
    wrong = wrong + 1
  end
end

function done(summary)
  local total = 0
  for _, thread in ipairs(threads) do
    total = total + thread:get("wrong")
  end
  local e = summary.errors
  print(string.format("counted %d %d %d %d", summary.requests, summary.duration, total, e.connect + e.read + e.write + e.timeout))
end
