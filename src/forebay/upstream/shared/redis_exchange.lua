-- One exchange of a member with a ledger: the same decision as `AccountLedger.exchange`, function by function.
--
-- KEYS[1] is the ledger, a MessagePack map like `LedgerState`, but for the reply of each member, which is packed.
-- ARGV[1] is the request, a MessagePack map like `ExchangeRequest`. The answer is a map like `ExchangeReply`.
-- Sums are over sorted names, so that rounding does not depend on the order of a table.

local LEASE, LAPSE = 5.0, 1.5
local MAX_RETRY, RECOVERY, KEEP_ENDED, MAX_ENDED = 0.25, 2.0, 3600.0, 128
local CHUNK, QUICK_CHUNK, EPSILON, LEAST_WAIT = 0.02, 0.02, 1e-9, 0.002
local MONEY_CHUNK, SHARE_OF_FREE, MONEY_EPSILON, MONEY_RETRY = 0.01, 0.25, 1e-12, 0.05
local HOUR, DAY = 3600, 86400
local floor, max, min = math.floor, math.max, math.min

local function read_clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function equal(one, other)
  if type(one) ~= 'table' or type(other) ~= 'table' then return one == other end
  for key, value in pairs(one) do
    if not equal(value, other[key]) then return false end
  end
  for key in pairs(other) do
    if one[key] == nil then return false end
  end
  return true
end

local function sorted_names(members)
  local names = {}
  for name in pairs(members) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- periods: see periods.py

local function day_of_month(day)
  local shifted = day + 719468
  local of_era = shifted - floor(shifted / 146097) * 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  local month = floor((5 * of_year + 2) / 153)
  return of_year - floor((153 * month + 2) / 5) + 1
end

local function period_start(per, now)
  if not per then return 0 end
  if per == 'hour' then return floor(now / HOUR) * HOUR end
  local day = floor(now / DAY)
  if per == 'day' then return day * DAY end
  return (day - day_of_month(day) + 1) * DAY
end

local function period_end(per, start)
  if not per then return nil end
  if per == 'month' then return period_start(per, start + 32 * DAY) end
  return start + (per == 'hour' and HOUR or DAY)
end

-- members: see ledger_state.py

local function wishes(state, member)
  return state.time <= member.seen + LAPSE
end

local function comes_before(one, name, other, other_name)
  if one.priority ~= other.priority then return one.priority < other.priority end
  if one.waiting_since ~= other.waiting_since then return one.waiting_since < other.waiting_since end
  return name < other_name
end

local function others_before(state, names, name)
  local own, before = state.members[name], {}
  for _, other in ipairs(names) do
    local each = state.members[other]
    if other ~= name and each.is_waiting and wishes(state, each) and comes_before(each, other, own, name) then
      before[#before + 1] = each
    end
  end
  return before
end

local function end_member(state, name, slots)
  local member = state.members[name]
  state.members[name] = nil
  state.ended[name] = {sequence = member.sequence, at = state.time, lost = member.held, slots = slots}
  local count = 0
  for other, ended in pairs(state.ended) do
    if ended.at < state.time - KEEP_ENDED then state.ended[other] = nil else count = count + 1 end
  end
  while count > MAX_ENDED do
    local oldest
    for other, ended in pairs(state.ended) do
      local first = oldest and state.ended[oldest]
      if not first or ended.at < first.at or (ended.at == first.at and other < oldest) then oldest = other end
    end
    state.ended[oldest], count = nil, count - 1
  end
end

local function kept(asked, held)
  local reserved = asked.reserved
  return min(held, asked.needed > held and reserved or max(reserved, asked.needed, asked.wanted))
end

-- quotas: see quota_shares.py

local function bound_quota(state, names, number)
  local held = 0
  for _, name in ipairs(names) do held = held + state.members[name].held[number] end
  state.levels[number] = min(state.levels[number], state.terms.quotas[number].amount - held)
end

local function refill_quotas(state, elapsed)
  local names = sorted_names(state.members)
  for number, quota in ipairs(state.terms.quotas) do
    state.levels[number] = state.levels[number] + elapsed * quota.amount / quota.seconds
    bound_quota(state, names, number)
  end
end

local function report_quotas(state, names, member, asked)
  for number, quota in ipairs(asked) do
    local used = quota.used
    if used > 0 then used = max(0, used - member.lost[number]) end
    member.lost[number] = 0
    local held = member.held[number] - used
    if held < 0 then
      state.levels[number] = state.levels[number] + held
      held = 0
    end
    member.held[number] = kept(quota, held)
    state.levels[number] = state.levels[number] + held - member.held[number]
    bound_quota(state, names, number)
  end
end

local function quota_wait(state, number, member, before)
  local quota = state.terms.quotas[number]
  if member.short[number] <= 0 then return 0 end
  local ahead = 0
  for _, other in ipairs(before) do ahead = ahead + other.short[number] end
  local missing = member.short[number] + ahead - state.levels[number]
  if missing <= EPSILON * quota.amount then return 0 end
  return max(LEAST_WAIT, missing * quota.seconds / quota.amount)
end

local function quota_chunk(state, names, number, name, before, wanted)
  local quota, level, waiting, ahead = state.terms.quotas[number], state.levels[number], 0, 0
  for _, other in ipairs(names) do
    local each = state.members[other]
    if other ~= name and wishes(state, each) then waiting = waiting + each.short[number] end
  end
  for _, other in ipairs(before) do ahead = ahead + other.short[number] end
  local available = max(level - waiting, min(level - ahead, QUICK_CHUNK * quota.amount / quota.seconds))
  return max(0, min(min(wanted, CHUNK * quota.amount) - state.members[name].held[number], available))
end

local function grant_quotas(state, names, name, asked)
  local member, before, waits, waiting = state.members[name], others_before(state, names, name), {}, false
  for number, quota in ipairs(asked) do
    member.short[number] = max(0, quota.needed - member.held[number])
  end
  for number in ipairs(asked) do
    waits[number] = quota_wait(state, number, member, before)
    waiting = waiting or waits[number] > 0
  end
  if waiting then return waits end
  for number, quota in ipairs(asked) do
    local needed = member.short[number]
    member.held[number] = member.held[number] + needed
    state.levels[number] = state.levels[number] - needed
    member.short[number] = 0
    local chunk = quota_chunk(state, names, number, name, before, max(quota.wanted, quota.needed))
    member.held[number] = member.held[number] + chunk
    state.levels[number] = state.levels[number] - chunk
  end
  return waits
end

-- slots: see slot_shares.py

local function slot_limit(state)
  if not state.terms.limit then return state.terms.max_concurrent end
  return state.time < state.silent_until and 0 or floor(state.limit)
end

local function fair_shares(limit, demands)
  local shares, open, left = {}, {}, limit
  for number, demand in ipairs(demands) do
    shares[number] = 0
    if demand > 0 then open[#open + 1] = number end
  end
  while #open > 0 and left >= #open do
    local each, still = floor(left / #open), {}
    for _, number in ipairs(open) do
      local granted = min(each, demands[number] - shares[number])
      shares[number], left = shares[number] + granted, left - granted
    end
    for _, number in ipairs(open) do
      if demands[number] > shares[number] then still[#still + 1] = number end
    end
    open = still
  end
  for index = 1, min(left, #open) do shares[open[index]] = shares[open[index]] + 1 end
  return shares
end

local function fair_share(state, names, name, limit, demand, wanting)
  local members, order, demands = state.members, {}, {}
  for index, other in ipairs(names) do order[index] = other end
  table.sort(order, function(one, other)
    if wanting > limit then
      local first, second = members[one].served_at, members[other].served_at
      if first ~= second then return first < second end
    else
      local first, second = members[one].slots, members[other].slots
      if first ~= second then return first > second end
    end
    return one < other
  end)
  for index, other in ipairs(order) do demands[index] = demand[other] end
  local shares = fair_shares(limit, demands)
  for index, other in ipairs(order) do
    if other == name then return shares[index] end
  end
end

local function grant_slots(state, names, name, asked, may_grow)
  local limit, member = slot_limit(state), state.members[name]
  local wanted = may_grow and max(asked.in_use, asked.wanted) or asked.in_use
  member.slots = max(asked.in_use, asked.held)
  member.slots_wanted = wanted
  local held_by_others, demand, wanting = 0, {}, 0
  for _, other in ipairs(names) do
    local each = state.members[other]
    if other ~= name then held_by_others = held_by_others + each.slots end
    demand[other] = wishes(state, each) and max(each.slots, each.slots_wanted) or each.slots
    if demand[other] > 0 then wanting = wanting + 1 end
  end
  if state.time < state.recovers_until then
    for _, ended in pairs(state.ended) do held_by_others = held_by_others + ended.slots end
  end
  local share = fair_share(state, names, name, limit, demand, wanting)
  local allowed = max(0, min(share, wanted, limit - held_by_others))
  if allowed > member.slots then member.served_at = state.time end
  member.slots = max(member.slots, allowed)
  local free = max(0, limit - held_by_others - member.slots)
  return {allowed = allowed, give_back = wanting > limit, free = free}
end

-- the limit: see limit_learning.py

local function begin_limit(state, asked)
  state.limit, state.limit_epoch, state.silent_until = asked and max(1, asked.level) or 1, 0, 0
end

local function report_limit(state, asked)
  if asked.epoch == state.limit_epoch then
    if asked.cut then
      state.limit, state.limit_epoch = min(state.limit, asked.cut), state.limit_epoch + 1
    end
    state.limit = state.limit + asked.raised
  end
  state.limit = max(1, min(state.limit, asked.most))
  if asked.silence > 0 then state.silent_until = max(state.silent_until, state.time + asked.silence) end
end

local function limit_reply(state, names, name)
  local others = 0
  for _, other in ipairs(names) do
    if other ~= name then others = others + state.members[other].slots end
  end
  local silence = max(0, state.silent_until - state.time)
  return {epoch = state.limit_epoch, level = state.limit, silence = silence, others = others}
end

-- money: see budget_shares.py

local function spent_by_all(state)
  return state.recovered + state.reported
end

local function begin_period(state, budget, now)
  local start = period_start(budget.per, now)
  if start > state.period then
    state.previous_period, state.previous_spent = state.period, spent_by_all(state)
    state.recovered, state.reported = 0, 0
    for _, member in pairs(state.members) do
      member.usd, member.usd_reserved, member.usd_short = 0, 0, 0
    end
  elseif start < state.period then
    if start == state.previous_period then state.recovered = state.recovered + state.previous_spent end
    state.previous_period, state.previous_spent = -1, 0
  end
  state.period = start
end

local function restore_spend(state, asked)
  if asked.period ~= state.period then return end
  state.recovered = state.recovered + max(0, asked.known_spent - spent_by_all(state))
end

local function report_spend(state, member, asked)
  if asked.period < state.period then
    member.usd, member.usd_reserved = 0, 0
    return
  end
  state.reported = state.reported + asked.spent
  local held = max(0, member.usd - asked.spent)
  member.usd_reserved = asked.reserved
  member.usd = max(asked.reserved, kept(asked, held))
end

local function grant_money(state, names, name, budget, asked)
  local member, held = state.members[name], 0
  for _, other in ipairs(names) do held = held + state.members[other].usd end
  local free = budget.usd - spent_by_all(state) - held
  local free_to_all = free - budget.reserved_share * budget.usd
  local needed, wanted = 0, 0
  if asked.period >= state.period or asked.period < 0 then needed, wanted = asked.needed, asked.wanted end
  member.usd_short = max(0, needed - member.usd)
  local available = asked.important and free or free_to_all
  if member.usd_short > 0 then
    local ahead = 0
    for _, other in ipairs(others_before(state, names, name)) do ahead = ahead + other.usd_short end
    if member.usd_short + ahead > available + MONEY_EPSILON * budget.usd then return end
    member.usd = member.usd + member.usd_short
    free_to_all = free_to_all - member.usd_short
    member.usd_short = 0
  end
  local waiting = 0
  for _, other in ipairs(names) do
    local each = state.members[other]
    if other ~= name and wishes(state, each) then waiting = waiting + each.usd_short end
  end
  local chunk = min(MONEY_CHUNK * budget.usd, SHARE_OF_FREE * (free_to_all - waiting) / #names)
  local beyond_need = member.usd - max(member.usd_reserved, needed)
  member.usd = member.usd + max(0, min(wanted - member.usd, chunk - beyond_need))
end

local function budget_reply(state, names, name, budget)
  local ends, reserved, recall = period_end(budget.per, state.period), 0, false
  for _, other in ipairs(names) do
    local each = state.members[other]
    reserved = reserved + each.usd_reserved
    recall = recall or (other ~= name and each.usd_short > 0 and wishes(state, each))
  end
  return {
    period = state.period, ends_in = ends and ends - state.clock, held = state.members[name].usd,
    spent = spent_by_all(state), reserved = reserved, recall = recall,
  }
end

-- the ledger: see ledger.py

local function open_ledger(now, request)
  local levels = {}
  for number, quota in ipairs(request.terms.quotas) do
    local asked = request.quotas[number]
    levels[number] = request.epoch == '' and quota.amount - (asked and asked.missing or 0) or 0
  end
  local state = {
    epoch = request.member .. ':' .. string.format('%d', request.sequence), terms = request.terms, clock = now, time = 0,
    levels = levels, members = {}, ended = {}, recovers_until = 0, period = -1, recovered = 0, reported = 0,
    previous_period = -1, previous_spent = 0,
  }
  begin_limit(state, request.limit)
  if request.budget then state.period, state.recovered = request.budget.period, request.budget.known_spent end
  return state
end

local function expires_at(state)
  local kept, budget = LEASE + KEEP_ENDED, state.terms.budget
  for number, quota in ipairs(state.terms.quotas) do
    kept = max(kept, KEEP_ENDED + (quota.amount - state.levels[number]) * quota.seconds / quota.amount)
  end
  if budget then
    local ends = period_end(budget.per, state.period)
    if not ends and not budget.forget_after then return nil end
    kept = max(kept, ends and ends - state.clock or budget.forget_after)
  end
  return state.clock + kept
end

local function advance(state, now)
  local elapsed = max(0, now - state.clock)
  state.clock, state.time = now, state.time + elapsed
  refill_quotas(state, elapsed)
  if state.terms.budget then begin_period(state, state.terms.budget, now) end
  local names, left = sorted_names(state.members), 0
  for _, name in ipairs(names) do
    local slots = math.ceil((slot_limit(state) or 0) / #names)
    if state.members[name].until_ < state.time then end_member(state, name, slots) else left = left + 1 end
  end
  if #names > 0 and left == 0 then state.recovers_until = state.time + RECOVERY end
end

local function replace_terms(state, now, request)
  local terms, levels, places = request.terms, {}, {}
  if terms.limit ~= state.terms.limit then begin_limit(state, request.limit) end
  for number, quota in ipairs(state.terms.quotas) do
    levels[quota.unit .. '/' .. quota.seconds] = state.levels[number]
    places[quota.unit .. '/' .. quota.seconds] = number
  end
  state.levels = {}
  for number, quota in ipairs(terms.quotas) do
    state.levels[number] = min(levels[quota.unit .. '/' .. quota.seconds] or quota.amount, quota.amount)
  end
  state.terms, state.members[request.member] = terms, nil
  for _, member in pairs(state.members) do
    local held, short, lost = {}, {}, {}
    for number, quota in ipairs(terms.quotas) do
      local place = places[quota.unit .. '/' .. quota.seconds]
      held[number], short[number] = 0, 0
      lost[number] = place and member.lost[place] + member.held[place] or 0
    end
    member.held, member.short, member.lost, member.is_waiting, member.proposed = held, short, lost, false, nil
  end
  if terms.budget then begin_period(state, terms.budget, now) end
end

local function join(state, request)
  local member = state.members[request.member]
  if member then return member, true end
  local ended, count = state.ended[request.member], #state.terms.quotas
  state.ended[request.member] = nil
  member = {
    sequence = request.sequence, until_ = state.time, seen = state.time, held = {}, short = {}, lost = {},
    waiting_since = 0, is_waiting = false, priority = 0, slots = 0, slots_wanted = 0, served_at = 0,
    usd = 0, usd_reserved = 0, usd_short = 0,
  }
  for number = 1, count do
    member.held[number], member.short[number] = 0, 0
    member.lost[number] = ended and #ended.lost == count and ended.lost[number] or 0
  end
  state.members[request.member] = member
  if request.epoch ~= '' and request.epoch ~= state.epoch then
    for number, level in ipairs(state.levels) do state.levels[number] = min(0, level) end
    local budget = request.budget
    if budget and budget.period == state.period then state.recovered = max(state.recovered, budget.known_spent) end
  end
  return member, not ended or request.sequence > ended.sequence
end

local function decide(state, request, member)
  local names, name = sorted_names(state.members), request.member
  if request.leaving then
    for number, held in ipairs(member.held) do
      state.levels[number] = state.levels[number] + held
      member.held[number] = 0
      bound_quota(state, names, number)
    end
    member.usd, member.usd_reserved = 0, 0
    return {epoch = state.epoch, members = #names - 1, rank = 0}
  end
  if not member.is_waiting then member.waiting_since = state.time end
  member.priority = request.priority
  local waits, retry = grant_quotas(state, names, name, request.quotas), nil
  for _, wait in ipairs(waits) do
    if wait > 0 then retry = max(retry or 0, wait) end
  end
  local slots, budget
  if request.slots and slot_limit(state) then
    slots = grant_slots(state, names, name, request.slots, not retry)
  end
  if request.budget and state.terms.budget then
    grant_money(state, names, name, state.terms.budget, request.budget)
    budget = budget_reply(state, names, name, state.terms.budget)
    if member.usd_short > 0 then retry = max(retry or 0, MONEY_RETRY) end
  end
  member.is_waiting = retry ~= nil
  local rank, competing, quotas = 0, 0, {}
  for index, other in ipairs(names) do
    local each = state.members[other]
    if other == name then rank = index - 1 end
    if each.is_waiting and wishes(state, each) then competing = competing + 1 end
  end
  for number, wait in ipairs(waits) do
    quotas[number] = {held = member.held[number], level = state.levels[number], wait = wait}
  end
  return {
    epoch = state.epoch, members = #names, rank = rank, competing = competing,
    retry_in = retry and min(MAX_RETRY, retry), quotas = quotas, slots = slots, budget = budget,
    limit = state.terms.limit and limit_reply(state, names, name),
  }
end

local function save(state)
  local ends, packed = expires_at(state), cmsgpack.pack(state)
  if ends then
    redis.call('SET', KEYS[1], packed, 'PX', string.format('%.0f', max(1, (ends - state.clock) * 1000)))
  else
    redis.call('SET', KEYS[1], packed)
  end
end

local request, now, packed = cmsgpack.unpack(ARGV[1]), read_clock(), redis.call('GET', KEYS[1])
local state = packed and cmsgpack.unpack(packed) or open_ledger(now, request)
advance(state, now)
local known = state.members[request.member]
if known and known.reply and request.sequence <= known.sequence then
  save(state)
  return known.reply
end
if not equal(request.terms, state.terms) then
  if known then known.proposed = request.terms end
  for other, each in pairs(state.members) do
    if other ~= request.member and not (each.proposed and equal(each.proposed, request.terms)) then
      save(state)
      local members = #sorted_names(state.members)
      return cmsgpack.pack({epoch = state.epoch, members = members, rank = 0, conflict = state.terms})
    end
  end
  replace_terms(state, now, request)
  known = nil
end
local heard = known or state.ended[request.member]
local forgotten = request.answered > (heard and heard.sequence or 0)
local member, counts = join(state, request)
member.sequence, member.seen, member.until_ = request.sequence, state.time, state.time + LEASE
member.proposed = nil
if counts then
  report_quotas(state, sorted_names(state.members), member, request.quotas)
  if request.budget then
    if forgotten then restore_spend(state, request.budget) end
    report_spend(state, member, request.budget)
  end
  if request.limit and request.epoch == state.epoch then report_limit(state, request.limit) end
end
local reply = cmsgpack.pack(decide(state, request, member))
member.reply = reply
if request.leaving then end_member(state, request.member, 0) end
save(state)
return reply
