"""The Lua scripts of the Redis backend: each is one atomic step, and sending it twice does no harm."""

SWAP_CLAIM = """
-- KEYS claim; ARGV epoch, status
local newest = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
if newest ~= tonumber(ARGV[1]) - 1 then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'status', ARGV[2])
return 1
"""

BEAT = """
-- KEYS claim, every key of the channel...; ARGV epoch, status, seconds to keep the channel from now on
local newest = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
if newest > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'status', ARGV[2])
for i = 1, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[3]) end
return 1
"""

APPEND = """
-- KEYS refs, ids, meta, writer claim; ARGV epoch, batch token, first seq, run id, attempt, refs, bytes, end or '',
-- then for each record its line and its sample id or ''. Returns {1, last} done, {0, last} out of order, {-1, 0} fenced
if tonumber(redis.call('HGET', KEYS[4], 'epoch') or '0') > tonumber(ARGV[1]) then return {-1, 0} end
local last = tonumber(redis.call('HGET', KEYS[3], 'seq') or '0')
if redis.call('HGET', KEYS[3], 'token') == ARGV[2] then return {1, last} end
if last ~= tonumber(ARGV[3]) - 1 then return {0, last} end
for i = 9, #ARGV, 2 do
  last = last + 1
  redis.call('XADD', KEYS[1], string.format('%.0f-0', last), 'r', ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('RPUSH', KEYS[2], ARGV[i + 1]) end
end
redis.call('HSET', KEYS[3], 'seq', string.format('%.0f', last), 'token', ARGV[2], 'epoch', ARGV[1],
           'run_id', ARGV[4], 'attempt', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'refs', ARGV[6])
redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[7])
if ARGV[8] ~= '' then redis.call('HSET', KEYS[3], 'end', ARGV[8]) end
return {1, last}
"""

STORE_CURSOR = """
-- KEYS cursor, reader claim, refs; ARGV epoch, document, first seq to keep. Returns 0 when fenced
if tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0') > tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('XTRIM', KEYS[3], 'MINID', ARGV[3] .. '-0')
return 1
"""
