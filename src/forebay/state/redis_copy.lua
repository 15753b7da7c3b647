-- Copies of entries on Redis, which redis_write.lua describes.
--
-- KEYS: the last version, then the entries. The reply: a version that none which was written is larger than, and for each
-- entry its text and the milliseconds after which it expires, as PTTL returns them.

local call = redis.call
local now = call('TIME')
local latest = math.max(tonumber(call('GET', KEYS[1]) or 0), now[1] * 1000000 + now[2])
local reply = { string.format('%.0f', latest) }
for number = 2, #KEYS do
  reply[2 * number - 2] = call('GET', KEYS[number])
  reply[2 * number - 1] = call('PTTL', KEYS[number])
end
return reply
