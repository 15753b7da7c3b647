-- A page of a scan on Redis: keys of a namespace in their order, with their entries, which redis_write.lua describes.
--
-- KEYS[1] is the index of the namespace. ARGV: the prefix of the entries' names, the bounds of the keys as ZRANGE takes
-- them by their order, from where the scan begins, how many, and REV or nothing. The reply: keys and entries in turns, and
-- at the end the last key that was looked at; nothing if there are no more.

local MAX_BYTES = 1048576 -- of entries in a page, but for the last one

local call = redis.call
local prefix, first, last, limit, reverse = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

local keys
if reverse == 'REV' then
  keys = call('ZREVRANGEBYLEX', KEYS[1], first, last, 'LIMIT', 0, limit + 1)
else
  keys = call('ZRANGEBYLEX', KEYS[1], first, last, 'LIMIT', 0, limit + 1)
end
local reply, size = {}, 0
for position, key in ipairs(keys) do
  if position > limit or size > MAX_BYTES then
    reply[#reply + 1] = keys[position - 1]
    break
  end
  local entry = call('GET', prefix .. key)
  if entry then -- else it has expired
    size = size + #entry
    reply[#reply + 1] = key
    reply[#reply + 1] = entry
  end
end
return reply
