-- One exchange of a member with a ledger: the same decision as `AccountLedger.exchange`, function by function.
--
-- KEYS[1] is the ledger, a MessagePack map like `LedgerState`, but for the reply of each member, which is packed.
-- ARGV[1] is the request, a MessagePack map like `ExchangeRequest`. The answer is a map like `ExchangeReply`.
-- Sums are over sorted names, so that rounding does not depend on the order of a table.

local LAYOUT = 3 -- see ledger_state.py
local LEASE, LEASE_MARGIN, LAPSE = 5.0, 0.25, 1.5
local MAX_RETRY, KEEP_ENDED, MAX_ENDED = 0.25, 3600.0, 128
local SILENCE, RECOVERY, UNNAMED = 2.5, 2.0, '?'
local CHUNK, QUICK_CHUNK, EPSILON, LEAST_WAIT = 0.02, 0.02, 1e-9, 0.002
local MARGIN, WINDOW_DELAY, ROUNDING, MAX_UNITS = 0.01, 0.2, 1.0, 8
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

local function end_probes(state, name)  -- see stoppages.py
  for _, stoppage in pairs(state.stoppages or {}) do stoppage.members[name] = nil end
end

local function end_member(state, name, ended_member)
  state.members[name] = nil
  end_probes(state, name)
  state.ended[name] = ended_member
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

-- observed quotas: see observed_quota.py

local function quota_of(state, number)
  local given = #state.terms.quotas
  if number <= given then return state.terms.quotas[number], false end
  return state.observed[number - given], true
end

local function held_of(state, names, number)
  local held = 0
  for _, name in ipairs(names) do held = held + state.members[name].held[number] end
  return held
end

local function refilled(quota, level, held, time, elapsed)
  if not quota.window_end then return level + elapsed * quota.amount / quota.seconds end
  if time < quota.window_end then return level end
  local windows = floor((time - quota.window_end) / quota.seconds) + 1
  quota.window_end = quota.window_end + quota.seconds * windows
  return quota.amount - held
end

local function margin_of(state, names, number, needed)
  local quota, is_observed = quota_of(state, number)
  if not is_observed or quota.window_end then return 0 end
  return max(0, min(MARGIN * quota.amount, quota.amount - held_of(state, names, number) - needed))
end

local function observed_wait(quota, missing, time)
  if not quota.window_end then return max(0, missing * quota.seconds / quota.amount) end
  if missing <= 0 then return max(0, quota.window_end - quota.seconds + WINDOW_DELAY - time) end
  return quota.window_end + WINDOW_DELAY - time + quota.seconds * (math.ceil(missing / quota.amount) - 1)
end

local function slot_limit(state)
  if not state.terms.limit then return state.terms.max_concurrent end
  return state.time < state.silent_until and 0 or floor(state.limit)
end

-- members that are absent: see absent_members.py

local function expect(state)
  state.away_until, state.recovers_until = state.time, state.time + RECOVERY
end

local function fair_slots(state, members)
  return math.ceil((slot_limit(state) or 0) / members)
end

local function unreported_usd(state, member, reply)
  local budget, known = state.terms.budget, reply.budget
  if not budget or not known then return 0 end
  local left = budget.usd
  if known.period == state.period then left = max(0, budget.usd - known.spent - known.reserved) end
  return member.usd_reserved + max(member.usd - member.usd_reserved, left / reply.members)
end

local function usd_left(state, request, share)
  if not state.terms.budget or not request.budget then return 0 end
  local spent = request.budget.period == state.period and request.budget.known_spent or 0
  return share * max(0, state.terms.budget.usd - spent)
end

local function expect_unnamed(state, request)
  if request.members == 0 then return end
  local share = 1 / request.members
  for number = 0, request.members - 1 do
    state.ended[UNNAMED .. string.format('%06d', number)] = {
      sequence = 0, at = state.time, lost = {}, until_ = state.time, share = share,
      slots = fair_slots(state, request.members), usd = usd_left(state, request, share),
    }
  end
  expect(state)
end

local function take_unnamed(state)
  for _, name in ipairs(sorted_names(state.ended)) do
    if name:sub(1, 1) == UNNAMED then
      local ended = state.ended[name]
      state.ended[name] = nil
      return ended
    end
  end
end

local function absent_member(state, name)
  local member = state.members[name]
  local reply = cmsgpack.unpack(member.reply)
  return {
    sequence = member.sequence, at = state.time, lost = member.held, until_ = member.until_, share = 1 / reply.members,
    slots = fair_slots(state, reply.members), usd = unreported_usd(state, member, reply),
  }
end

local function absent_members(state)
  local absent = {}
  if state.time >= state.recovers_until then return absent end
  local function add(ended)
    if ended and ended.share > 0 and ended.at >= state.away_until then absent[#absent + 1] = ended end
  end
  for _, name in ipairs(sorted_names(state.ended)) do add(state.ended[name]) end
  for _, name in ipairs(sorted_names(state.members)) do add(state.members[name].absence) end
  return absent
end

local function quota_of_the_absent(state, number)
  local quota, used = quota_of(state, number), 0
  for _, ended in ipairs(absent_members(state)) do
    local seconds = state.time - ended.until_ + LEASE_MARGIN
    used = used + min(1, seconds / quota.seconds) * ended.share * quota.amount
  end
  return used
end

-- quotas: see quota_shares.py

local function free_level(state, number)
  return state.levels[number] - quota_of_the_absent(state, number)
end

local function bound_quota(state, names, number)
  local quota, is_observed = quota_of(state, number)
  state.levels[number] = min(state.levels[number], quota.amount - held_of(state, names, number))
  if is_observed then state.levels[number] = max(state.levels[number], -quota.amount) end
end

local function refill_quotas(state, elapsed)
  local names = sorted_names(state.members)
  for number in ipairs(state.levels) do
    local quota, is_observed = quota_of(state, number)
    if is_observed then
      local held = held_of(state, names, number)
      state.levels[number] = refilled(quota, state.levels[number], held, state.time, elapsed)
    else
      state.levels[number] = state.levels[number] + elapsed * quota.amount / quota.seconds
    end
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

local function quota_wait(state, names, number, member, before)
  local quota, is_observed = quota_of(state, number)
  if member.short[number] <= 0 then return 0 end
  local ahead = 0
  for _, other in ipairs(before) do ahead = ahead + other.short[number] end
  local needed = member.short[number] + ahead
  local missing = needed + margin_of(state, names, number, needed) - free_level(state, number)
  if is_observed then
    local wait = observed_wait(quota, missing > EPSILON * quota.amount and missing or 0, state.time)
    return wait > 0 and max(LEAST_WAIT, wait) or 0
  end
  if missing <= EPSILON * quota.amount then return 0 end
  return max(LEAST_WAIT, missing * quota.seconds / quota.amount)
end

local function quota_chunk(state, names, number, name, before, wanted)
  local quota, is_observed = quota_of(state, number)
  if is_observed and observed_wait(quota, 0, state.time) > 0 then return 0 end
  local level, waiting, ahead = free_level(state, number) - margin_of(state, names, number, 0), 0, 0
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
    waits[number] = quota_wait(state, names, number, member, before)
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

-- the limits that headers show: see observed_learning.py

local function number_of(state, unit)
  for number, quota in ipairs(state.observed) do
    if quota.unit == unit then return #state.terms.quotas + number end
  end
  return nil
end

local function begin_observed(state, names, asked)
  if #state.observed >= MAX_UNITS then return nil end
  state.observed[#state.observed + 1] = {
    unit = asked.unit, amount = asked.amount, seconds = asked.seconds, epoch = 0,
    window_end = asked.ends_in and state.time + asked.ends_in, counted = 0, doubted_until = 0,
  }
  local left = asked.seen and asked.seen.remaining - asked.under_way or 0
  state.levels[#state.levels + 1] = max(-asked.amount, min(left, asked.amount))
  for _, name in ipairs(names) do
    local member = state.members[name]
    member.under_way = member.under_way or {}
    for _, amounts in ipairs({member.held, member.short, member.lost, member.under_way}) do
      amounts[#amounts + 1] = 0
    end
  end
  return #state.levels
end

local function change_observed(state, names, number, asked)
  local quota = quota_of(state, number)
  if asked.amount > quota.amount then
    state.levels[number] = state.levels[number] + asked.amount - quota.amount
  end
  quota.amount, quota.seconds = asked.amount, asked.seconds
  quota.window_end = asked.ends_in and state.time + asked.ends_in or nil
  quota.epoch = quota.epoch + 1
  bound_quota(state, names, number)
end

local function report_observed(state, names, member, request)
  local given = #state.terms.quotas
  for _, asked in ipairs(request.observed or {}) do
    local number = number_of(state, asked.unit) or begin_observed(state, names, asked)
    if number then
      local quota = quota_of(state, number)
      if request.epoch == state.epoch and asked.epoch == quota.epoch then
        if asked.is_changed then change_observed(state, names, number, asked) end
        if asked.doubt then quota.doubted_until = state.time + asked.doubt end
      end
      member.under_way[number - given] = asked.under_way
    end
  end
end

local function quota_requests(state, request)
  local given, quotas, by_unit = #state.terms.quotas, {}, {}
  for number = 1, given do quotas[number] = request.quotas[number] end
  for number, asked in ipairs(request.observed or {}) do by_unit[asked.unit] = request.quotas[given + number] end
  for number, quota in ipairs(state.observed) do
    quotas[given + number] = by_unit[quota.unit] or {used = 0, reserved = 0, needed = 0, wanted = 0}
  end
  return quotas
end

local function correct_level(state, names, member, number, seen)
  local quota, level = quota_of(state, number), state.levels[number]
  local held, under_way, refill = held_of(state, names, number), 0, 0
  for _, name in ipairs(names) do
    under_way = under_way + state.members[name].under_way[number - #state.terms.quotas]
  end
  if not quota.window_end then refill = seen.age * quota.amount / quota.seconds + ROUNDING end
  local most = seen.remaining + refill - (seen.throttled and held or member.held[number])
  if level > most then
    state.levels[number] = most
  else
    local used_since = max(0, quota.counted - seen.counted)
    state.levels[number] = max(level, seen.remaining - held - under_way - used_since)
  end
  bound_quota(state, names, number)
end

local function correct_observed(state, names, member, request)
  for index, asked in ipairs(request.observed or {}) do
    local number = number_of(state, asked.unit)
    if number then
      local quota = quota_of(state, number)
      quota.counted = quota.counted + max(0, request.quotas[#state.terms.quotas + index].used)
      if asked.seen and asked.epoch == quota.epoch and request.epoch == state.epoch then
        correct_level(state, names, member, number, asked.seen)
      end
    end
  end
end

local function observed_replies(state)
  local replies = {}
  for number, quota in ipairs(state.observed) do
    replies[number] = {
      unit = quota.unit, amount = quota.amount, seconds = quota.seconds, epoch = quota.epoch, counted = quota.counted,
      ends_in = quota.window_end and quota.window_end - state.time, doubt = max(0, quota.doubted_until - state.time),
    }
  end
  return replies
end

-- the learned rate: see rate_shares.py

local function trial_elsewhere(state, name)
  local ends = 0
  for other, member in pairs(state.members) do
    if other ~= name then ends = max(ends, member.rate_trial_until or 0) end
  end
  return max(0, ends - state.time)
end

local function report_rate(state, member, request)
  local asked = request.rate
  member.rate_demand = asked.demand
  if asked.trial > 0 and trial_elsewhere(state, request.member) == 0 then
    member.rate_trial_until = state.time + asked.trial
  end
  state.rate_counted = state.rate_counted + asked.counted
  local epoch = request.epoch == state.epoch and asked.epoch or -1
  if asked.learned and (epoch == state.rate_epoch or state.rate_epoch == 0) then
    state.rate, state.rate_epoch, state.rate_at = asked.learned, state.rate_epoch + 1, state.time
  end
end

local function fair_rates(total, names, demands)
  local parts, left, open = {}, total, names
  while #open > 0 do
    local each, still = left / #open, {}
    for _, name in ipairs(open) do
      if demands[name] <= each then parts[name] = demands[name] else still[#still + 1] = name end
    end
    if #still == #open then
      for _, name in ipairs(open) do parts[name] = each end
      return parts
    end
    for _, name in ipairs(open) do
      if parts[name] then left = left - parts[name] end
    end
    open = still
  end
  for _, name in ipairs(names) do parts[name] = parts[name] + left / #names end
  return parts
end

local function rate_share(state, names, name)
  local wanting, demands, wanted = {}, {}, 0
  for _, other in ipairs(names) do
    local member = state.members[other]
    local demand = member.rate_demand or 0
    if other == name then
      wanting[#wanting + 1] = other
    elseif demand > 0 and wishes(state, member) then
      wanting[#wanting + 1], demands[other], wanted = other, demand, wanted + demand
    end
  end
  local own = state.members[name].rate_demand or 0
  local rate = state.rate and state.rate.rate or wanted + own
  if rate <= 0 then return 1 end
  demands[name] = own > 0 and own or rate
  return min(1, fair_rates(rate, wanting, demands)[name] / rate)
end

local function rate_reply(state, names, name)
  return {
    epoch = state.rate_epoch, counted = state.rate_counted, share = rate_share(state, names, name),
    learned = state.rate, age = state.rate_epoch > 0 and state.time - state.rate_at or 0,
    trial = trial_elsewhere(state, name),
  }
end

-- slots: see slot_shares.py

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
  for _, ended in ipairs(absent_members(state)) do
    if ended ~= member.absence then held_by_others = held_by_others + ended.slots end
  end
  local share = fair_share(state, names, name, limit, demand, wanting)
  local allowed = max(0, min(share, wanted, limit - held_by_others))
  if allowed > member.slots then member.served_at = state.time end
  member.slots = max(member.slots, allowed)
  local free = max(0, limit - held_by_others - member.slots)
  return {allowed = allowed, give_back = wanting > limit, free = free}
end

-- the limit: see limit_learning.py

local function no_answers()
  return {accepted = 0, refused = 0, contradicted = 0}
end

local function begin_limit(state, asked)
  state.limit, state.limit_epoch, state.silent_until = asked and max(1, asked.level) or 1, 0, 0
  state.limit_answers = no_answers()
end

local function report_limit(state, asked)
  if asked.epoch == state.limit_epoch then
    if asked.cut then
      state.limit, state.limit_epoch = min(state.limit, asked.cut), state.limit_epoch + 1
      state.limit_answers = no_answers()
    end
    state.limit = max(state.limit, min(state.limit + asked.returned, asked.returns_to)) + asked.raised
    for kind, count in pairs(asked.answers) do
      state.limit_answers[kind] = state.limit_answers[kind] + count
    end
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
  return {
    epoch = state.limit_epoch, level = state.limit, silence = silence, others = others, answers = state.limit_answers,
  }
end

-- stoppages of calls: see stoppages.py

local function stoppage_of(state, kind)
  state.stoppages = state.stoppages or {}
  local stoppage = state.stoppages[kind]
  if not stoppage then
    stoppage = {
      epoch = 0, openings = 0, until_ = 0, passed = 0, calls = 0, faults = 0, details = {}, told_at = 0, members = {},
    }
    state.stoppages[kind] = stoppage
  end
  return stoppage
end

local function stoppage_member(stoppage, name)
  local member = stoppage.members[name]
  if not member then
    member = {probes = 0, calls = stoppage.calls, faults = stoppage.faults, accepted = false}
    stoppage.members[name] = member
  end
  return member
end

local function forget_calls(stoppage)
  stoppage.calls, stoppage.faults = 0, 0
  for _, member in pairs(stoppage.members) do member.calls, member.faults = 0, 0 end
end

local function replace_stoppage(state, stoppage, asked)
  stoppage.openings, stoppage.passed = asked.openings or 0, asked.passed or 0
  stoppage.until_ = state.time + (asked.seconds or 0)
  stoppage.details, stoppage.told_at = asked.details or {}, state.time
  forget_calls(stoppage)
end

local function count_calls(state, stoppage, member, asked)
  local passes = asked.passes or 0
  if stoppage.openings == 0 then
    local calls, faults = asked.calls or 0, asked.faults or 0
    stoppage.calls, stoppage.faults = stoppage.calls + calls, stoppage.faults + faults
    member.calls, member.faults = member.calls + calls, member.faults + faults
  elseif passes > 0 then
    stoppage.until_, stoppage.passed = min(stoppage.until_, state.time), stoppage.passed + passes
    if stoppage.passed >= (asked.successes or 1) then
      stoppage.epoch, stoppage.openings, stoppage.passed = stoppage.epoch + 1, 0, 0
      forget_calls(stoppage)
    end
  end
end

local function report_stoppages(state, name, asked)
  for kind, request in pairs(asked) do
    local stoppage, epoch = stoppage_of(state, kind), max(0, request.epoch or -1)
    local member = stoppage_member(stoppage, name)
    if epoch > stoppage.epoch or (epoch == stoppage.epoch and request.changed) then
      stoppage.epoch, member.accepted = epoch + (request.changed and 1 or 0), request.changed or false
      replace_stoppage(state, stoppage, request)
    elseif request.epoch == stoppage.epoch and (request.calls or request.passes) then
      count_calls(state, stoppage, member, request)
    end
  end
end

local function stoppage_reply(state, stoppage, member, asked)
  local elsewhere, probes = -member.probes, asked.probes or 0
  for _, each in pairs(stoppage.members) do elsewhere = elsewhere + each.probes end
  member.probes = probes
  if stoppage.openings > 0 and state.time >= stoppage.until_ then
    member.probes = max(probes, min(asked.wanted or 0, (asked.most_probes or 1) - elsewhere))
  end
  local calls, faults, accepted = stoppage.calls - member.calls, stoppage.faults - member.faults, member.accepted
  member.calls, member.faults, member.accepted = stoppage.calls, stoppage.faults, false
  return {
    epoch = stoppage.epoch, accepted = accepted, openings = stoppage.openings,
    seconds = stoppage.openings > 0 and max(0, stoppage.until_ - state.time) or 0, passed = stoppage.passed,
    probes = member.probes, elsewhere = elsewhere, calls = calls, faults = faults, details = stoppage.details,
    age = state.time - stoppage.told_at,
  }
end

local function stoppage_replies(state, name, asked)
  local replies
  for kind, request in pairs(asked) do
    local stoppage = stoppage_of(state, kind)
    local member = stoppage_member(stoppage, name)
    local quiet = request.epoch == stoppage.epoch and stoppage.openings == 0 and not member.accepted
    if not quiet or member.probes > 0 or member.calls ~= stoppage.calls then
      replies = replies or {}
      replies[kind] = stoppage_reply(state, stoppage, member, request)
    end
  end
  return replies
end

-- money: see budget_shares.py

local function spent_by_all(state)
  return state.recovered + state.reported
end

local function begin_period(state, budget, now)
  local start = period_start(budget.per, now)
  if start > state.period then
    state.previous_period, state.previous_spent = state.period, spent_by_all(state)
    state.recovered, state.reported, state.alerted = 0, 0, 0
    for _, member in pairs(state.members) do
      member.usd, member.usd_reserved, member.usd_short = 0, 0, 0
    end
    for _, ended in pairs(state.ended) do ended.usd = ended.share * budget.usd end
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
  local absent = 0
  for _, ended in ipairs(absent_members(state)) do absent = absent + ended.usd end
  local free = budget.usd - spent_by_all(state) - held - absent
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

local function take_alert(state, budget, asked)
  if asked.period == state.period or asked.logged_period == state.period then
    state.alerted = max(state.alerted, asked.alerted)
  end
  local spent, least, due = spent_by_all(state), budget.usd * (1 - MONEY_EPSILON), 0
  if spent >= least or (asked.exhausted and asked.period == state.period) then
    due = 1
  elseif spent >= asked.alert * least then
    due = asked.alert
  end
  if due <= state.alerted then return 0 end
  state.alerted = due
  return due
end

local function budget_reply(state, names, name, budget, asked)
  local ends, reserved, recall = period_end(budget.per, state.period), 0, false
  for _, other in ipairs(names) do
    local each = state.members[other]
    reserved = reserved + each.usd_reserved
    recall = recall or (other ~= name and each.usd_short > 0 and wishes(state, each))
  end
  return {
    period = state.period, ends_in = ends and ends - state.clock, held = state.members[name].usd,
    spent = spent_by_all(state), reserved = reserved, recall = recall, alert = take_alert(state, budget, asked),
    alerted = state.alerted,
  }
end

-- the ledger: see ledger.py

local NEW_LEDGER = {
  time = 0, away_until = 0, recovers_until = 0, period = -1, recovered = 0, reported = 0, alerted = 0,
  previous_period = -1, previous_spent = 0, limit = 1, limit_epoch = 0, silent_until = 0,
  rate_epoch = 0, rate_at = 0, rate_counted = 0,
}
local NEW_MEMBER = {
  waiting_since = 0, is_waiting = false, priority = 0, slots = 0, slots_wanted = 0, served_at = 0,
  usd = 0, usd_reserved = 0, usd_short = 0, rate_demand = 0, rate_trial_until = 0,
}
local NEW_ENDED = {until_ = 0, share = 0, slots = 0, usd = 0}

local function fill(map, defaults)
  for key, value in pairs(defaults) do
    if map[key] == nil then map[key] = value end
  end
end

local function load_ledger(packed)
  local is_packed, state = pcall(cmsgpack.unpack, packed)
  if not is_packed or type(state) ~= 'table' or not state.terms then return nil, cmsgpack.pack({layout = 0}) end
  local layout = state.layout or 1
  if layout > LAYOUT then return nil, cmsgpack.pack({layout = layout}) end
  if layout < LAYOUT then
    fill(state, NEW_LEDGER)
    state.observed = state.observed or {}
    state.limit_answers = state.limit_answers or no_answers()
    for _, member in pairs(state.members) do
      fill(member, NEW_MEMBER)
      member.under_way = member.under_way or {}
    end
    for _, ended in pairs(state.ended) do fill(ended, NEW_ENDED) end
    state.layout = LAYOUT
  end
  return state
end

local function open_ledger(now, request)
  local levels = {}
  for number, quota in ipairs(request.terms.quotas) do
    local asked = request.quotas[number]
    levels[number] = request.epoch == '' and quota.amount - (asked and asked.missing or 0) or 0
  end
  local state = {
    epoch = request.member .. ':' .. string.format('%d', request.sequence), terms = request.terms, clock = now,
    levels = levels, members = {}, ended = {}, observed = {}, layout = LAYOUT,
  }
  fill(state, NEW_LEDGER)
  begin_limit(state, request.limit)
  if request.terms.budget then
    begin_period(state, request.terms.budget, now)
    if request.budget and request.budget.logged_period == state.period then
      state.recovered = request.budget.logged_spent
    end
  end
  expect_unnamed(state, request)
  return state
end

local function expires_at(state)
  local kept, budget = LEASE + KEEP_ENDED, state.terms.budget
  for number, level in ipairs(state.levels) do
    local quota = quota_of(state, number)
    kept = max(kept, KEEP_ENDED + (quota.amount - level) * quota.seconds / quota.amount)
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
  if elapsed > SILENCE and next(state.members) then expect(state) end
  for _, name in ipairs(sorted_names(state.members)) do
    if state.members[name].until_ < state.time then end_member(state, name, absent_member(state, name)) end
  end
end

local function replace_terms(state, now, request)
  local terms, levels, places = request.terms, {}, {}
  if terms.limit ~= state.terms.limit then begin_limit(state, request.limit) end
  for number, quota in ipairs(state.terms.quotas) do
    levels[quota.unit .. '/' .. quota.seconds] = state.levels[number]
    places[quota.unit .. '/' .. quota.seconds] = number
  end
  local observed = {}
  for number = #state.terms.quotas + 1, #state.levels do observed[#observed + 1] = state.levels[number] end
  state.levels = {}
  for number, quota in ipairs(terms.quotas) do
    state.levels[number] = min(levels[quota.unit .. '/' .. quota.seconds] or quota.amount, quota.amount)
  end
  for _, level in ipairs(observed) do state.levels[#state.levels + 1] = level end
  for name in pairs(state.members) do end_probes(state, name) end
  local given = #state.terms.quotas
  state.terms, state.members[request.member] = terms, nil
  for _, member in pairs(state.members) do
    local held, short, lost = {}, {}, {}
    for number, quota in ipairs(terms.quotas) do
      local place = places[quota.unit .. '/' .. quota.seconds]
      held[number], short[number] = 0, 0
      lost[number] = place and member.lost[place] + member.held[place] or 0
    end
    for number = 1, #observed do
      local place, now_at = given + number, #terms.quotas + number
      held[now_at], short[now_at], lost[now_at] = 0, 0, member.lost[place] + member.held[place]
    end
    member.held, member.short, member.lost, member.is_waiting, member.proposed = held, short, lost, false, nil
  end
  if terms.budget then begin_period(state, terms.budget, now) end
end

local function join(state, request)
  local member = state.members[request.member]
  if member then
    member.absence = nil
    return member, true
  end
  local ended, count = state.ended[request.member], #state.levels
  state.ended[request.member] = nil
  member = {
    sequence = request.sequence, until_ = state.time, seen = state.time, held = {}, short = {}, lost = {},
    absence = ended, under_way = {},
  }
  fill(member, NEW_MEMBER)
  for number = 1, #state.observed do member.under_way[number] = 0 end
  for number = 1, count do
    member.held[number], member.short[number] = 0, 0
    member.lost[number] = ended and #ended.lost == count and ended.lost[number] or 0
  end
  state.members[request.member] = member
  if request.epoch ~= '' and request.epoch ~= state.epoch then
    member.absence = take_unnamed(state)
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
  local waits, retry = grant_quotas(state, names, name, quota_requests(state, request)), nil
  for _, wait in ipairs(waits) do
    if wait > 0 then retry = max(retry or 0, wait) end
  end
  local slots, budget
  if request.slots and slot_limit(state) then
    slots = grant_slots(state, names, name, request.slots, not retry)
  end
  if request.budget and state.terms.budget then
    grant_money(state, names, name, state.terms.budget, request.budget)
    budget = budget_reply(state, names, name, state.terms.budget, request.budget)
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
    limit = state.terms.limit and limit_reply(state, names, name), observed = observed_replies(state),
    rate = request.rate and rate_reply(state, names, name),
    stoppages = request.stoppages and stoppage_replies(state, name, request.stoppages),
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
local state, unreadable
if packed then
  state, unreadable = load_ledger(packed)
  if unreadable then return unreadable end
else
  state = open_ledger(now, request)
end
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
  local names = sorted_names(state.members)
  report_observed(state, names, member, request)
  report_quotas(state, names, member, quota_requests(state, request))
  correct_observed(state, names, member, request)
  if request.rate then report_rate(state, member, request) end
  if request.budget then
    if forgotten then restore_spend(state, request.budget) end
    report_spend(state, member, request.budget)
  end
  if request.limit and request.epoch == state.epoch then report_limit(state, request.limit) end
  if request.stoppages then report_stoppages(state, request.member, request.stoppages) end
end
local reply = cmsgpack.pack(decide(state, request, member))
member.reply = reply
if request.leaving then
  local left = {sequence = member.sequence, at = state.time, lost = member.held}
  fill(left, NEW_ENDED)
  end_member(state, request.member, left)
end
save(state)
return reply
