-- The task store on Redis: one run of this script does a group of operations, all of them or none.
--
-- KEYS has the tag of the overflow in all its names, so that they are in one slot of a cluster. ARGV[1] is the group, in
-- JSON; the rest are the envelopes and completions of its operations, in their order. An operation is an array: its
-- name, and what it takes. The reply has one value for each.
--
-- A client numbers its groups. The replies of its last one are kept, so that a group whose answer was lost can be sent
-- again, to the same master or the next one: it is done once.
--
-- A record has a number, its sequence, in 15 digits, which sort. `tasks` holds it as an array in JSON:

local ID, QUEUE, RANK, ENQUEUED, KEY, THREAD, STATE, FENCE = 1, 2, 3, 4, 5, 6, 7, 8
local ATTEMPTS, FAILURES, TOTAL_DELAY, LAST_ERROR, NOT_BEFORE, ORIGIN, USAGE = 9, 10, 11, 12, 13, 14, 15
-- QUEUE is "type|priority|tenant|", and sorts with RANK (the deadline and the time of submission, in 32 digits) and the
-- sequence the members of `waiting`. FENCE is the lease, or the one that ended it. ORIGIN is the group that put it.

local ids, keys, tasks, envelopes, completions = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local unfinished, waiting, parked, leased, delayed = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local ended = { done = KEYS[11], dead = KEYS[12] }
local heads, threads, depths, sequence, bound, last = KEYS[13], KEYS[14], KEYS[15], KEYS[16], KEYS[17], KEYS[18]
local store_id = KEYS[19]

local CHUNK = 1000 -- arguments of one command: the stack of Lua is bounded
local SCANNED = 2000 -- records that one listing, or count, looks at, so that no other client waits long
local REMEMBERED = 3600 -- seconds for which a group is told from its repetition

local call = redis.call
local group = cjson.decode(ARGV[1])

-- Reading and writing records ------------------------------------------------------------------------------------

local known = {} -- sequence by task id; false: there is none
local packed = {} -- records in JSON, read in advance
local loaded = {} -- records by sequence; false: there is none
local changed = {} -- sequences of loaded records that are to be written
local depth_changes, thread_changes = {}, {}
local any_waits, any_ended = false, false -- a record has become waiting, or has ended

local function in_chunks(command, key, arguments, each)
  for first = 1, #arguments, CHUNK do
    local final = math.min(first + CHUNK - 1, #arguments)
    local answer = call(command, key, unpack(arguments, first, final))
    if each then
      for index, value in ipairs(answer) do
        each(arguments[first + index - 1], value)
      end
    end
  end
end

local function read_ahead(sequences)
  in_chunks('HMGET', tasks, sequences, function(seq, value)
    packed[seq] = value
  end)
end

local function find(id)
  local seq = known[id]
  if seq == nil then
    seq = call('HGET', ids, id)
    known[id] = seq
  end
  return seq
end

local function load(seq)
  local record = loaded[seq]
  if record == nil then
    local text = packed[seq]
    if text == nil then
      text = call('HGET', tasks, seq)
    end
    record = text and cjson.decode(text)
    loaded[seq] = record
  end
  return record
end

local function find_record(id)
  local seq = find(id)
  if not seq then
    return false
  end
  return seq, load(seq)
end

local function count(changes, name, by)
  changes[name] = (changes[name] or 0) + by
end

local function write_counts(key, changes)
  for name, by in pairs(changes) do
    if by ~= 0 and call('HINCRBY', key, name, by) <= 0 then
      call('HDEL', key, name)
    end
  end
end

local function write_changes()
  local pairs_ = {}
  for seq in pairs(changed) do
    pairs_[#pairs_ + 1] = seq
    pairs_[#pairs_ + 1] = cjson.encode(loaded[seq])
  end
  in_chunks('HSET', tasks, pairs_)
  write_counts(depths, depth_changes)
  write_counts(threads, thread_changes)
end

-- Queues and conversations ---------------------------------------------------------------------------------------

local function age(seq, record)
  return string.sub(record[RANK], 17) .. seq
end

local function become(seq, record, state, fence)
  record[STATE], record[FENCE] = state, fence
  changed[seq] = true
end

local function enqueue(seq, record)
  become(seq, record, 'waiting', false)
  call('ZADD', waiting, 0, record[QUEUE] .. record[RANK] .. seq)
  count(depth_changes, record[QUEUE], 1)
  any_waits = true
end

-- Take a record out of the index of its state.
local function leave(seq, record)
  local state = record[STATE]
  if state == 'waiting' then
    call('ZREM', waiting, record[QUEUE] .. record[RANK] .. seq)
    count(depth_changes, record[QUEUE], -1)
  elseif state == 'parked' then
    call('ZREM', parked, record[THREAD] .. '|' .. age(seq, record))
  elseif state == 'leased' then
    call('ZREM', leased, seq)
  elseif state == 'delayed' then
    call('ZREM', delayed, seq)
  end
end

local function park(seq, record)
  become(seq, record, 'parked', false)
  call('ZADD', parked, 0, record[THREAD] .. '|' .. age(seq, record))
end

-- Let the oldest record of a conversation wait, unless one is leased or delayed.
local function settle(thread)
  local oldest = call('ZRANGEBYLEX', parked, '[' .. thread .. '|', '(' .. thread .. '}', 'LIMIT', 0, 1)[1]
  if not oldest then
    return
  end
  local seq = string.sub(oldest, -15)
  local record = load(seq)
  local head = call('HGET', heads, thread)
  if head then
    local other = load(head)
    if other[STATE] ~= 'waiting' or age(head, other) < age(seq, record) then
      return
    end
    leave(head, other)
    park(head, other)
  end
  leave(seq, record)
  call('HSET', heads, thread, seq)
  enqueue(seq, record)
end

-- Let a record wait that is in no index, behind the others of its conversation.
local function wait(seq, record)
  local thread = record[THREAD]
  if not thread then
    enqueue(seq, record)
    return
  end
  if call('HGET', heads, thread) == seq then
    call('HDEL', heads, thread)
  end
  park(seq, record)
  settle(thread)
end

local function leave_conversation(seq, record)
  local thread = record[THREAD]
  if thread then
    count(thread_changes, thread, -1)
    if call('HGET', heads, thread) == seq then
      call('HDEL', heads, thread)
    end
    settle(thread)
  end
end

local function drop(seq, record)
  call('ZREM', ended[record[STATE]], record[ID])
  call('HDEL', ids, record[ID])
  call('HDEL', tasks, seq)
  call('HDEL', envelopes, seq)
  call('HDEL', completions, seq)
  if record[KEY] and record[STATE] == 'done' then
    call('HDEL', keys, record[KEY])
  end
  known[record[ID]], loaded[seq], changed[seq] = false, false, nil
end

-- How many ended records of a state are kept: by the largest bound under which one was put, so that a client with a
-- smaller one drops none of the others'.
local kept

local function drop_oldest(state)
  kept = kept or math.max(group.bound, tonumber(call('GET', bound) or 0))
  local excess = call('ZCARD', ended[state]) - kept
  if excess > 0 then
    for _, id in ipairs(call('ZRANGE', ended[state], 0, excess - 1)) do
      drop(find_record(id))
    end
  end
end

-- End a record; its fence stays, so that its holder may ask again.
local function finish(seq, record, state, at, completion, keeps_key)
  leave(seq, record)
  become(seq, record, state, record[FENCE])
  call('ZREM', unfinished, record[ID])
  call('ZADD', ended[state], at, record[ID])
  any_ended = true
  call('HSET', completions, seq, completion)
  if record[KEY] and not keeps_key then
    call('HDEL', keys, record[KEY])
  end
  if state == 'done' then
    call('HDEL', envelopes, seq)
    record[KEY] = keeps_key and record[KEY]
  end
  leave_conversation(seq, record)
  if call('ZCARD', ended[state]) > group.bound then
    drop_oldest(state)
  end
end

-- Operations that write ------------------------------------------------------------------------------------------

local capacity -- records that still fit
local next_sequence

local function is_held(record, fence)
  return record and record[STATE] == 'leased' and record[FENCE] == fence
end

local writes = {}

-- Keep a record from being leased until its submitter shows it, once it is acknowledged; or, if nobody does, until a
-- time at which it wakes.
local function hide(seq, record, until_)
  become(seq, record, 'delayed', false)
  call('ZADD', delayed, until_, seq)
  return 'hidden'
end

-- Let a record that is in no index wait; or lease it, if none of its conversation is before it.
local function enter(seq, record, fence, until_)
  local thread = record[THREAD]
  if thread or not fence then
    wait(seq, record)
  end
  if not fence then
    return record[STATE] == 'parked' and 'parked' or 'stored'
  end
  if thread then
    if record[STATE] == 'parked' then
      return 'parked'
    end
    leave(seq, record)
  end
  become(seq, record, 'leased', fence)
  call('ZADD', leased, until_, seq)
  return 'stored'
end

function writes.put(op, envelope)
  local _, id, queue, rank, enqueued, key, thread, fence, until_, attempts, failures, total_delay, error = unpack(op)
  local usage, not_before, due, hidden_until = op[14], op[15], op[16], op[17]
  local seq, record = find_record(id)
  local makes_way = false
  if record then
    if record[STATE] == 'dead' then
      makes_way = key and record[KEY] == key
    else
      makes_way = record[STATE] == 'done' and not record[KEY]
    end
    if not makes_way then
      return 'duplicate'
    end
  end
  if key and call('HEXISTS', keys, key) == 1 then
    return 'duplicate'
  end
  if not next_sequence then
    return 'oom'
  end
  if capacity <= 0 then
    return 'full'
  end
  if makes_way then
    drop(seq, record)
  end
  capacity = capacity - 1
  seq = string.format('%015d', next_sequence)
  next_sequence = next_sequence + 1
  record = { id, queue, rank, enqueued, key, thread, 'parked', false, attempts, failures, total_delay, error, false, false }
  record[NOT_BEFORE], record[ORIGIN], record[USAGE] = not_before, group.id, usage
  known[id], loaded[seq], changed[seq] = seq, record, true
  call('HSET', ids, id, seq)
  call('HSET', envelopes, seq, envelope)
  call('ZADD', unfinished, enqueued, id)
  if key then
    call('HSET', keys, key, id)
  end
  if thread then
    count(thread_changes, thread, 1)
  end
  if hidden_until then
    return hide(seq, record, due and tonumber(due) > tonumber(hidden_until) and due or hidden_until)
  end
  if due then -- it joins its conversation when it wakes
    become(seq, record, 'delayed', false)
    call('ZADD', delayed, due, seq)
    return 'stored'
  end
  return enter(seq, record, fence, until_)
end

-- Remove a record that has not ended, and make room for another one.
local function remove(seq, record)
  leave(seq, record)
  call('ZREM', unfinished, record[ID])
  call('HDEL', ids, record[ID])
  call('HDEL', tasks, seq)
  call('HDEL', envelopes, seq)
  if record[KEY] then
    call('HDEL', keys, record[KEY])
  end
  known[record[ID]], loaded[seq], changed[seq] = false, false, nil
  leave_conversation(seq, record)
end

-- Put a record in place of one that is leased; the fence of that is behind what `put` takes.
function writes.replace(op, envelope)
  local seq, record = find_record(op[2])
  if not is_held(record, op[18]) then
    return false
  end
  if not next_sequence then
    return 'oom'
  end
  remove(seq, record)
  capacity = capacity + 1
  return writes.put(op, envelope)
end

function writes.set_envelope(op, envelope)
  local seq, record = find_record(op[2])
  if not record or record[STATE] == 'done' then
    return false
  end
  call('HSET', envelopes, seq, envelope)
  return true
end

-- Take back a record whose storing was not acknowledged, unless somebody has begun to run it.
function writes.take_back(op)
  local _, id, origin, fence = unpack(op)
  local seq, record = find_record(id)
  if not record or record[ORIGIN] ~= origin or ended[record[STATE]] then
    return false
  end
  if record[STATE] == 'leased' and record[FENCE] ~= fence then
    return false
  end
  remove(seq, record)
  return true
end

-- Do with a hidden record what it was put for.
function writes.show(op)
  local _, id, origin, due, fence, until_ = unpack(op)
  local seq, record = find_record(id)
  if not record or record[STATE] ~= 'delayed' or record[FENCE] or origin ~= record[ORIGIN] then
    return false
  end
  if due then
    call('ZADD', delayed, due, seq)
    return 'stored'
  end
  leave(seq, record)
  return enter(seq, record, fence, until_)
end

-- What the records of one priority are ordered by.
local function place(member)
  return string.sub(member, -47)
end

-- Return the first waiting record of each tenant, of a task type and priority.
local function first_of_each(prefix)
  local firsts, from, upto = {}, '[' .. prefix, '(' .. string.sub(prefix, 1, -2) .. '}'
  while true do
    local first = call('ZRANGEBYLEX', waiting, from, upto, 'LIMIT', 0, 1)[1]
    if not first then
      return firsts
    end
    firsts[#firsts + 1] = first
    from = '(' .. string.sub(first, 1, -49) .. '}'
  end
end

-- Return the first `limit` waiting records of a task type and priority, whosever they are.
local function best_of_all(prefix, limit)
  local heads = first_of_each(prefix)
  if #heads == 1 then
    return call('ZRANGEBYLEX', waiting, '[' .. heads[1], '(' .. string.sub(prefix, 1, -2) .. '}', 'LIMIT', 0, limit)
  end
  table.sort(heads, function(one, other)
    return place(one) < place(other)
  end)
  local found = {}
  while #heads > 0 and #found < limit do
    local best = table.remove(heads, 1)
    found[#found + 1] = best
    local upto = '(' .. string.sub(best, 1, -49) .. '}'
    local following = call('ZRANGEBYLEX', waiting, '(' .. best, upto, 'LIMIT', 0, 1)[1]
    if following then -- it takes its place among the others
      local low, high = 1, #heads + 1
      while low < high do
        local middle = math.floor((low + high) / 2)
        if place(heads[middle]) < place(following) then
          low = middle + 1
        else
          high = middle
        end
      end
      table.insert(heads, low, following)
    end
  end
  return found
end

function writes.lease(op)
  local _, task_type, priorities, limit, until_, fence, shares = unpack(op)
  local members = {}
  for _, priority in ipairs(priorities) do
    local prefix = task_type .. '|' .. priority .. '|'
    if shares then
      for _, share in ipairs(shares) do
        local queue = prefix .. share[1]
        local most = math.min(share[2], limit - #members)
        if most > 0 then
          local found = call('ZRANGEBYLEX', waiting, '[' .. queue .. '|', '(' .. queue .. '}', 'LIMIT', 0, most)
          for _, member in ipairs(found) do
            members[#members + 1] = member
          end
        end
      end
    elseif limit > #members then
      for _, member in ipairs(best_of_all(prefix, limit - #members)) do
        members[#members + 1] = member
      end
    end
  end
  local sequences, scores = {}, {}
  for index, member in ipairs(members) do
    local seq = string.sub(member, -15)
    sequences[index] = seq
    scores[2 * index - 1], scores[2 * index] = until_, seq
  end
  in_chunks('ZREM', waiting, members)
  in_chunks('ZADD', leased, scores)
  read_ahead(sequences)
  for _, seq in ipairs(sequences) do
    local record = load(seq)
    become(seq, record, 'leased', fence .. '-' .. seq)
    count(depth_changes, record[QUEUE], -1)
  end
  return sequences
end

function writes.lease_ids(op)
  local _, given, until_, fence = unpack(op)
  local sequences = {}
  for _, id in ipairs(given) do
    local seq, record = find_record(id)
    if record and record[STATE] == 'waiting' then
      leave(seq, record)
      become(seq, record, 'leased', fence .. '-' .. seq)
      call('ZADD', leased, until_, seq)
      sequences[#sequences + 1] = seq
    end
  end
  return sequences
end

function writes.begin_attempt(op)
  local seq, record = find_record(op[2])
  if not is_held(record, op[3]) then
    return false
  end
  record[ATTEMPTS] = record[ATTEMPTS] + 1
  changed[seq] = true
  return true
end

function writes.renew(op)
  local seq, record = find_record(op[2])
  if not is_held(record, op[3]) then
    return false
  end
  call('ZADD', leased, op[4], seq)
  return true
end

-- Give a record the failures that an operation has from its index `first` on.
local function set_failures(record, op, first)
  record[FAILURES], record[TOTAL_DELAY], record[LAST_ERROR] = op[first], op[first + 1], op[first + 2]
  record[ORIGIN] = record[ORIGIN] or false -- of a record that an earlier version stored: arrays have no holes
  record[USAGE] = op[first + 3]
end

function writes.release(op)
  local seq, record = find_record(op[2])
  if is_held(record, op[3]) then
    record[ATTEMPTS] = op[4]
    set_failures(record, op, 5)
    leave(seq, record)
    wait(seq, record)
  end
  return true
end

function writes.record_failures(op)
  local seq, record = find_record(op[2])
  if not is_held(record, op[3]) then
    return false
  end
  set_failures(record, op, 4)
  changed[seq] = true
  return true
end

function writes.delay(op)
  local fence, is_repeated = op[3], op[9]
  local seq, record = find_record(op[2])
  if not is_held(record, fence) then
    return is_repeated and record and record[STATE] == 'delayed' and record[FENCE] == fence
  end
  leave(seq, record)
  become(seq, record, 'delayed', fence)
  set_failures(record, op, 5)
  call('ZADD', delayed, op[4], seq)
  return true
end

function writes.wake(op)
  local due = call('ZRANGEBYSCORE', delayed, '-inf', op[2], 'LIMIT', 0, op[3])
  read_ahead(due)
  in_chunks('ZREM', delayed, due)
  for _, seq in ipairs(due) do
    wait(seq, load(seq))
  end
  local next_due = call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]
  return { #due, call('ZCARD', delayed), next_due or false }
end

function writes.finish(op, completion)
  local _, id, fence, at, succeeded, is_repeated = unpack(op)
  local seq, record = find_record(id)
  if not record or ended[record[STATE]] then
    return is_repeated and record and record[STATE] == 'done' and record[FENCE] == fence
  end
  if record[STATE] == 'leased' then
    if record[FENCE] ~= fence then
      return false
    end
  elseif fence then
    return false
  end
  finish(seq, record, 'done', at, completion, succeeded)
  return true
end

function writes.mark_dead(op, completion)
  local _, id, fence, at, is_repeated = unpack(op)
  local seq, record = find_record(id)
  if not is_held(record, fence) then
    return is_repeated and record and record[STATE] == 'dead' and record[FENCE] == fence
  end
  finish(seq, record, 'dead', at, completion, false)
  return true
end

-- End a lease that has expired, unless it was renewed or ended since it was read.
function writes.expire(op, completion)
  local _, seq, fence, now, latest, at = unpack(op)
  local record = load(seq)
  local score = is_held(record, fence) and tonumber(call('ZSCORE', leased, seq))
  if not score or (score >= tonumber(now) and score <= tonumber(latest)) then
    return false
  end
  if at then
    finish(seq, record, 'dead', at, completion, false)
  else
    leave(seq, record)
    wait(seq, record)
  end
  return true
end

function writes.prune(op)
  local old = call('ZRANGEBYSCORE', ended.done, '-inf', '(' .. op[2], 'LIMIT', 0, op[3])
  for _, id in ipairs(old) do
    drop(find_record(id))
  end
  return #old
end

function writes.requeue(op)
  local seq, record = find_record(op[2])
  if not record or record[STATE] ~= 'dead' then
    return false
  end
  if record[KEY] and call('HEXISTS', keys, record[KEY]) == 1 then
    return 'duplicate'
  end
  if call('ZCARD', unfinished) >= group.bound then
    return 'full'
  end
  call('ZREM', ended.dead, record[ID])
  call('HDEL', completions, seq)
  call('ZADD', unfinished, record[ENQUEUED], record[ID])
  if record[KEY] then
    call('HSET', keys, record[KEY], record[ID])
  end
  record[ATTEMPTS], record[FAILURES], record[TOTAL_DELAY], record[LAST_ERROR] = 0, 0, '0', false
  record[ORIGIN] = record[ORIGIN] or false
  record[USAGE] = false
  if record[THREAD] then
    count(thread_changes, record[THREAD], 1)
  end
  wait(seq, record)
  return 'stored'
end

function writes.delete_dead(op)
  local seq, record = find_record(op[2])
  if not record or record[STATE] ~= 'dead' then
    return false
  end
  drop(seq, record)
  return true
end

-- Operations that read, after those that write; of a repeated group again ----------------------------------------

local reads = {}

function reads.lease(_, sequences)
  local leases = {}
  read_ahead(sequences)
  in_chunks('HMGET', envelopes, sequences, function(seq, envelope)
    if packed[seq] and envelope then -- of a repetition: others may have ended it meanwhile
      leases[#leases + 1] = packed[seq]
      leases[#leases + 1] = envelope
    end
  end)
  return leases
end

reads.lease_ids = reads.lease

function reads.expired(op)
  local _, now, latest, limit = unpack(op)
  local sequences = call('ZRANGEBYSCORE', leased, '-inf', '(' .. now, 'LIMIT', 0, limit)
  for _, seq in ipairs(call('ZRANGEBYSCORE', leased, '(' .. latest, '+inf', 'LIMIT', 0, limit - #sequences)) do
    sequences[#sequences + 1] = seq
  end
  local records = {}
  in_chunks('HMGET', tasks, sequences, function(seq, value)
    records[#records + 1] = seq
    records[#records + 1] = value
  end)
  return records
end

function reads.envelope(op)
  return call('HGET', envelopes, op[2])
end

function reads.find(op)
  local seq = call('HGET', ids, op[2])
  return seq and { call('HGET', tasks, seq), call('HGET', envelopes, seq), call('HGET', completions, seq) }
end

function reads.find_key(op)
  return call('HGET', keys, op[2])
end

-- Return whether a member of a sorted set follows another one of its score: by bytes, while < knows the locale.
local function is_behind(member, other)
  for position = 1, math.min(#member, #other) do
    local one, two = string.byte(member, position), string.byte(other, position)
    if one ~= two then
      return one > two
    end
  end
  return #member > #other
end

-- Count leased records by queue, up to SCANNED of them from a rank on, and say how many these are.
function reads.leased(op)
  local sequences, counts = call('ZRANGE', leased, op[2], op[2] + SCANNED - 1), {}
  in_chunks('HMGET', tasks, sequences, function(_, text)
    if text then
      count(counts, cjson.decode(text)[QUEUE], 1)
    end
  end)
  local found = { #sequences }
  for queue, number in pairs(counts) do
    found[#found + 1] = queue
    found[#found + 1] = number
  end
  return found
end

-- List up to `limit` records of a state behind a time and id, and where to go on; false: that is all.
function reads.list(op)
  local _, state, limit, after, after_id = unpack(op)
  local index = ended[state] or unfinished
  local times = state == 'leased' and leased or state == 'delayed' and delayed
  local found, first, scanned = {}, call('ZCOUNT', index, '-inf', '(' .. after), 0
  while true do
    local page = call('ZRANGE', index, first, first + 199, 'WITHSCORES')
    if #page == 0 then
      return { found, false, false }
    end
    for position = 1, #page, 2 do
      local id, score = page[position], page[position + 1]
      if tonumber(score) > tonumber(after) or is_behind(id, after_id) then
        local seq = call('HGET', ids, id)
        local text = call('HGET', tasks, seq)
        if index ~= unfinished or cjson.decode(text)[STATE] == state then
          found[#found + 1] = text
          found[#found + 1] = index ~= unfinished and call('HGET', completions, seq)
          found[#found + 1] = times and call('ZSCORE', times, seq)
        end
        scanned = scanned + 1
        if #found >= 3 * limit or scanned >= SCANNED then
          return { found, score, id }
        end
      end
    end
    first = first + 200
  end
end

-- The group ------------------------------------------------------------------------------------------------------

local TAKES_BLOB = { put = true, replace = true, set_envelope = true, finish = true, mark_dead = true, expire = true }

local BY_ID = {
  put = true,
  replace = true,
  set_envelope = true,
  take_back = true,
  show = true,
  begin_attempt = true,
  renew = true,
  release = true,
  record_failures = true,
  delay = true,
  finish = true,
  mark_dead = true,
  requeue = true,
  delete_dead = true,
}

local function write_group()
  local names, puts = {}, 0
  for _, op in ipairs(group.ops) do
    if BY_ID[op[1]] then
      names[#names + 1] = op[2]
    end
    if op[1] == 'put' or op[1] == 'replace' then
      puts = puts + 1
    end
  end
  local sequences = {}
  in_chunks('HMGET', ids, names, function(id, seq)
    known[id] = seq
    if seq then
      sequences[#sequences + 1] = seq
    end
  end)
  read_ahead(sequences)
  if puts > 0 then
    capacity = group.bound - call('ZCARD', unfinished)
    -- The first write: Redis allows no other one to add to a full memory, and all others after any first one.
    local reserved = redis.pcall('INCRBY', sequence, puts)
    if type(reserved) == 'number' then
      next_sequence = reserved - puts + 1
    elseif string.sub(reserved.err, 1, 3) ~= 'OOM' then
      return reserved
    end
  end
  call('ZREM', waiting, '') -- there is none: a first write that adds nothing, so that a full memory can be emptied
  if puts > 0 and group.bound > tonumber(call('GET', bound) or 0) then
    call('SET', bound, string.format('%.0f', group.bound))
  end
  local replies, blob = {}, 1
  for index, op in ipairs(group.ops) do
    local write = writes[op[1]]
    if TAKES_BLOB[op[1]] then
      blob = blob + 1
    end
    replies[index] = write and write(op, ARGV[blob]) or false
  end
  write_changes()
  if group.number then
    call('SET', last, cjson.encode({ group.number, replies }), 'EX', REMEMBERED)
  end
  if any_waits or any_ended then
    call('PUBLISH', group.channel, (any_waits and 'w' or '') .. (any_ended and 'e' or '') .. ':' .. group.client)
  end
  return replies
end

if call('GET', store_id) ~= group.store then
  return 'lost' -- the records that the client knows are gone
end
local replies
local remembered = group.number and call('GET', last)
remembered = remembered and cjson.decode(remembered)
if remembered and remembered[1] > group.number then
  return redis.error_reply('STALE the client has gone on since')
elseif remembered and remembered[1] == group.number then
  -- A write, on the connection that waits for replicas and disks: they wait for the last write of their own.
  call('EXPIRE', last, REMEMBERED)
  replies = remembered[2]
else
  replies = write_group()
  if replies.err then
    return replies
  end
end
packed = {}
for index, op in ipairs(group.ops) do
  local read = reads[op[1]]
  if read then
    replies[index] = read(op, replies[index])
  end
end
return replies
