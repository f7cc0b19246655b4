
-- The rows of a JSON array, as SQLite's json_each gives them. Not strict, so that the planner sees through it.
create function kiln_each(items text) returns table (value jsonb) language sql immutable as
  $$ select i.value from jsonb_array_elements(items::jsonb) as i(value) $$;
-- Now, milliseconds since the Unix epoch, by this server's clock.
create function kiln_now() returns bigint language sql volatile as
  $$ select cast(extract(epoch from clock_timestamp()) * 1000 as bigint) $$;
-- Rows that change often leave room for their next version on the same page.
alter table jobs set (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);
alter table workers set (fillfactor = 70);
