-- Machines that workers keep when their jobs are over. `life` and `epoch` are those of the attempt; `live_ms` is the end of the machine's own lease,
-- which the worker's heartbeats move, `until_ms` the time at which it goes whatever happens.
create table kept (
  job text primary key not null,
  tenant text not null,
  owner text not null,
  pool text not null,
  worker text not null,
  attempt {int} not null,
  life {int} not null,
  epoch {int} not null,
  cpus {int} not null,
  memory {int} not null,
  disk {int} not null,
  facts text not null,
  since_ms {int} not null,
  until_ms {int} not null,
  live_ms {int} not null,
  home text not null
){strict};
create index kept_worker on kept (worker);
create index kept_tenant on kept (tenant, job);
