-- Writes of entries on Redis: one run of this script does a group of them, each of them or not.
--
-- An entry is a string: its version in decimal, a colon, and its data. An index has the keys of a namespace, as a sorted
-- set whose scores are 0, so that they sort; another one has the keys that expire, by the milliseconds since the epoch. A
-- tombstone is a string: the version of what was removed while its key moved here from another shard; for an entry that
-- expires, one less, as it may move away and come back.
--
-- KEYS: the last version, the replies to the last group of this client, then for each namespace its index and its index
-- of expiries, then for each operation its entry, then the tombstones of those that move. ARGV[1] is the group, in JSON:
-- the number of the group, the lengths of the prefixes of the namespaces, and for each operation its namespace, the
-- version that it depends on (-1: any), the milliseconds after which it expires (0: it does not; -1: the entry is
-- deleted). If its key moves, also the place of its tombstone in KEYS; the version that its own is larger than; and the
-- version with which the entry is restored (0: it is an ordinary write). Then the data of those that write, in their
-- order. The reply has for each operation the version that it wrote; 1 or 0, if it deleted an entry or found none, or
-- restored one or not; or -1 minus the version that it found, if it depends on another one; or "full". All are strings:
-- a number of Lua has too few digits in JSON.
--
-- A client numbers its groups. The replies to its last one are kept, so that a group that is sent again, because its
-- answer was lost, is done once.

local REMEMBERED = 600 -- seconds for which a group is told from its repetition
local KEPT = 30 * 24 * 3600 -- seconds after the last write for which its version is kept; the clock is ahead by then
local SWEPT = 10 -- expired keys that a group takes out of the index of each namespace
local TOMBSTONE_TTL = 600000 -- milliseconds

local call = redis.call
local group = cjson.decode(ARGV[1])
local number, lengths, ops = group[1], group[2], group[3]
local last_version, last_group = KEYS[1], KEYS[2]
local first_entry = 2 + 2 * #lengths

local remembered = call('GET', last_group)
remembered = remembered and cjson.decode(remembered)
if remembered and remembered[1] == number then
  call('EXPIRE', last_group, REMEMBERED) -- a write: replicas and disks are waited for up to the last one of a client
  return remembered[2]
elseif remembered and remembered[1] > number then
  return redis.error_reply('STALE the client has gone on since')
end

local now = call('TIME')
local milliseconds = now[1] * 1000 + math.floor(now[2] / 1000)
local version = math.max(tonumber(call('GET', last_version) or 0), now[1] * 1000000 + now[2] - 1)

local function text(integer)
  return string.format('%.0f', integer)
end

-- The first write: with its memory full, Redis refuses it, and after any other one it refuses none.
local reserved = redis.pcall('SET', last_version, text(version), 'EX', KEPT)
local is_full = type(reserved) == 'table' and reserved.err ~= nil
if is_full and string.sub(reserved.err, 1, 3) ~= 'OOM' then
  return reserved
end

local function find(entry)
  local head = call('GETRANGE', entry, 0, 20)
  return tonumber(string.match(head, '^(%d+):') or 0)
end

local has_expiries = {} -- by the name of the index of expiries; most namespaces have none
for space = 1, #lengths do
  local index, expiries = KEYS[1 + 2 * space], KEYS[2 + 2 * space]
  for _, key in ipairs(call('ZRANGEBYSCORE', expiries, '-inf', milliseconds - 1, 'LIMIT', 0, SWEPT)) do
    call('ZREM', expiries, key)
    call('ZREM', index, key)
  end
  has_expiries[expiries] = #call('ZRANGEBYSCORE', expiries, '-inf', '+inf', 'LIMIT', 0, 1) > 0
end

local function write(entry, index, expiries, key, ttl, written, data, is_new)
  local value = written .. ':' .. data
  if ttl > 0 then
    call('SET', entry, value, 'PX', ttl)
    call('ZADD', expiries, milliseconds + ttl, key)
    has_expiries[expiries] = true
  else
    call('SET', entry, value)
    if has_expiries[expiries] then
      call('ZREM', expiries, key)
    end
  end
  if is_new then
    call('ZADD', index, 0, key)
  end
end

local replies, data = {}, 1
for number_, op in ipairs(ops) do
  local entry, index, expiries = KEYS[first_entry + number_], KEYS[1 + 2 * op[1]], KEYS[2 + 2 * op[1]]
  local expected, ttl, floor, restored = op[2], op[3], op[5] or 0, op[6] or 0
  local tombstone = op[4] and KEYS[op[4]]
  if ttl >= 0 then
    data = data + 1
  end
  local found = find(entry)
  if expected >= 0 and expected ~= found then
    replies[number_] = text(-1 - found)
  elseif ttl >= 0 and is_full then
    replies[number_] = 'full'
  else
    local key = string.sub(entry, lengths[op[1]] + 1)
    if restored > 0 then
      local is_newer = math.max(found, tonumber(call('GET', tombstone) or 0)) < restored
      if is_newer then
        version = math.max(version, restored)
        write(entry, index, expiries, key, ttl, text(restored), ARGV[data], found == 0)
      end
      replies[number_] = is_newer and '1' or '0'
    elseif ttl < 0 then
      call('DEL', entry)
      call('ZREM', index, key)
      call('ZREM', expiries, key)
      replies[number_] = found > 0 and '1' or '0'
      if tombstone and found > 0 then
        call('SET', tombstone, text(found), 'PX', TOMBSTONE_TTL)
      end
    else
      version = math.max(version, found, floor) + 1
      replies[number_] = text(version)
      write(entry, index, expiries, key, ttl, replies[number_], ARGV[data], found == 0)
      if tombstone and ttl > 0 then
        call('SET', tombstone, text(version - 1), 'PX', ttl + TOMBSTONE_TTL)
      end
    end
  end
end

call('SET', last_version, text(version), 'EX', KEPT)
call('SET', last_group, cjson.encode({ number, replies }), 'EX', REMEMBERED)
return replies
