-- The saga log on Redis: one run of this script does one operation on one saga, and is safe to repeat.
--
-- A run may be repeated because its answer was lost with the connection, or arrive after its own repetition. So what does
-- not tell by itself that it was done takes a nonce, the id of the client and a number that grows, which the header keeps.
-- A repetition writes what is there already: replicas and disks are waited for up to the last write of a connection, and
-- its own may have been on another one.
--
-- KEYS: the header of the saga, its entries, then the indexes of the log: of what is unfinished, of all sagas by their
-- state, and of those that are to be forgotten. ARGV: the operation, the id of the saga, and what the operation takes.
-- The header is a hash, the entries are a list. Numbers to compare are times, as 16 digits that sort, and so do the
-- members of the indexes, whose scores are 0:
--
--   unfinished: the quoted name, "|", the end of the lease, the time of the first entry, the id
--   states:     the state, "|", the time of the first entry, the id
--   ended:      the time of the last entry, the id

local header, entries, unfinished, states, ended = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local operation, id = ARGV[1], ARGV[2]

local FIRST = 8 -- where the entries to write begin in ARGV
local CHUNK = 1000 -- arguments of one command: the stack of Lua is bounded
local NO_LEASE = '8000000000000000' -- epoch second 0

local UNFINISHED = { running = true, compensating = true }
local REPEATABLE = { compensated = true, resolved = true }
local FORGETTABLE = { done = true, compensated = true, resolved = true }

local call = redis.call

local found = call('HMGET', header, 'name', 'state', 'created', 'updated', 'holder', 'lease', 'nonce')
local name, state, created, updated = found[1], found[2], found[3], found[4]
local holder, lease, nonce = found[5], found[6], found[7]

-- Write nothing, but so that Redis lets what follows add to a full memory: a saga that has begun is to end.
local function allow_full_memory()
  call('HDEL', header, '')
end

-- Return whether an operation with this nonce was done already.
local function was_done(own)
  local client, number = string.match(nonce or '', '^(.*):(%d+)$')
  local own_client, own_number = string.match(own, '^(.*):(%d+)$')
  return client == own_client and tonumber(own_number) <= tonumber(number)
end

local function touch()
  allow_full_memory()
  call('HSET', header, 'state', state)
end

local function stored()
  return {
    call('HMGET', header, 'name', 'version', 'envelope', 'submission', 'state', 'why', 'created', 'updated', 'claims'),
    holder,
    lease,
    call('LRANGE', entries, 0, -1),
  }
end

local function leave()
  call('ZREM', states, state .. '|' .. created .. id)
  if UNFINISHED[state] then
    call('ZREM', unfinished, name .. '|' .. lease .. created .. id)
  elseif FORGETTABLE[state] then
    call('ZREM', ended, updated .. id)
  end
end

local function enter()
  call('ZADD', states, 0, state .. '|' .. created .. id)
  if UNFINISHED[state] then
    call('ZADD', unfinished, 0, name .. '|' .. lease .. created .. id)
  elseif FORGETTABLE[state] then
    call('ZADD', ended, 0, updated .. id)
  end
end

local function push()
  for from = FIRST, #ARGV, CHUNK do
    call('RPUSH', entries, unpack(ARGV, from, math.min(from + CHUNK - 1, #ARGV)))
  end
end

-- Give the lease to a fence.
local function take(fence, until_, own_nonce)
  allow_full_memory()
  leave()
  holder, lease = fence, until_
  call('HINCRBY', header, 'claims', 1)
  call('HSET', header, 'holder', holder, 'lease', lease, 'nonce', own_nonce)
  enter()
end

-- Write the entries of an append or an amendment, with their state.
local function write(now, ends_lease, own_nonce)
  local new_state, why = ARGV[FIRST - 2], ARGV[FIRST - 1]
  allow_full_memory()
  push()
  ends_lease = ends_lease or not UNFINISHED[new_state]
  local moves = ends_lease or new_state ~= state
  if moves then
    leave()
  end
  state, updated = new_state, now
  call('HSET', header, 'state', state, 'why', why, 'updated', updated, 'claims', 0, 'nonce', own_nonce)
  if ends_lease then
    holder, lease = '', NO_LEASE
    call('HSET', header, 'holder', holder, 'lease', lease)
  end
  if moves then
    enter()
  end
  return 1
end

local operations = {}

-- Begin a saga, or take it.
function operations.begin()
  local fence, until_, now, own_nonce = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  local is_repeated = was_done(own_nonce)
  if state and not is_repeated and UNFINISHED[state] and lease <= now then
    take(fence, until_, own_nonce)
  elseif not state or (REPEATABLE[state] and not is_repeated) then
    local is_new = not state
    if not is_new then
      call('RPUSH', entries, ARGV[11]) -- refused if the memory is full, and then nothing is written
      leave()
    end
    name, state, created, updated, holder, lease = ARGV[7], 'running', now, now, fence, until_
    enter() -- so is this
    call('HSET', header, 'name', name, 'version', ARGV[8], 'envelope', ARGV[9], 'submission', ARGV[10],
      'state', state, 'why', '', 'created', created, 'updated', updated, 'claims', 0,
      'holder', holder, 'lease', lease, 'nonce', own_nonce)
    if is_new then
      return 1
    end
  else
    touch()
  end
  return stored()
end

-- Take an unfinished saga.
function operations.claim()
  local fence, until_, now, own_nonce = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  if not state or not UNFINISHED[state] then
    return false
  elseif was_done(own_nonce) and holder == fence then
    touch()
  elseif lease <= now and not was_done(own_nonce) then
    take(fence, until_, own_nonce)
  else
    return false
  end
  return stored()
end

function operations.append()
  local fence, now, number = ARGV[3], ARGV[4], tonumber(ARGV[5])
  local count = #ARGV - FIRST + 1
  local length = state and call('LLEN', entries)
  if not state then
    return 0
  elseif length >= number + count then
    local there = call('LRANGE', entries, number, number + count - 1)
    for index = 1, count do
      if there[index] ~= ARGV[FIRST - 1 + index] then
        return 0
      end
    end
    touch()
    return 1
  elseif holder ~= fence or length ~= number then
    return 0
  end
  return write(now, false, nonce)
end

function operations.amend()
  local own_nonce, now, number = ARGV[3], ARGV[4], tonumber(ARGV[5])
  if not state then
    return 0
  elseif was_done(own_nonce) then
    touch()
    return 1
  elseif lease > now or call('LLEN', entries) ~= number then
    return 0
  end
  return write(now, true, own_nonce)
end

function operations.renew()
  if not state or holder ~= ARGV[3] then
    return 0
  end
  allow_full_memory()
  leave()
  lease = ARGV[4]
  call('HSET', header, 'lease', lease)
  enter()
  return 1
end

-- End a lease: with a nonce, only that of the operation that took it.
function operations.release()
  if not state or holder ~= ARGV[3] or (ARGV[4] and ARGV[4] ~= nonce) then
    return 0
  end
  allow_full_memory()
  leave()
  holder, lease = '', NO_LEASE
  call('HSET', header, 'holder', holder, 'lease', lease, 'claims', 0)
  enter()
  return 1
end

function operations.get()
  if not state then
    return false
  end
  if ARGV[3] == 'durably' then
    touch()
  end
  return stored()
end

function operations.forget()
  if not state or not FORGETTABLE[state] or updated >= ARGV[3] then
    return 0
  end
  leave()
  call('UNLINK', header, entries)
  return 1
end

return operations[operation]()
