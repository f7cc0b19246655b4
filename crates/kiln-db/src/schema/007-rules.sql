-- What a tenant may use of idle room beyond its quota, what it is sure of, and how many bytes are kept for it: the requests of its jobs are
-- counted here, its uploads where they lie.
alter table tenants add column burst {int} not null default 0;
alter table tenants add column reserved {int} not null default 0;
alter table tenants add column stored_max {int};
alter table tenants add column stored {int} not null default 0;
update tenants set stored = (
  select coalesce(sum(octet_length(r.body)), 0) from requests r
  where r.job in (select j.id from jobs j where j.tenant = tenants.name)
    or r.job in (select h.id from history h where h.tenant = tenants.name)
);
-- Whoever has no bound has the usual one from now on; an operator takes it away.
update tenants set stored_max = 21474836480;
update tenants set pending_max = 10000 where pending_max is null;

-- What is kept for ever until somebody says otherwise, and who said so. `hold` of tenants and history says the same, where it is looked for.
create table holds (
  kind text not null,
  name text not null,
  tenant text not null,
  reason text not null,
  set_by text not null,
  since_ms {int} not null,
  primary key (kind, name)
){strict};
insert into holds (kind, name, tenant, reason, set_by, since_ms) select 'tenant', name, name, '', 'kiln', 0 from tenants where hold <> 0;
insert into holds (kind, name, tenant, reason, set_by, since_ms) select 'job', id, tenant, '', 'kiln', 0 from history where hold <> 0;
