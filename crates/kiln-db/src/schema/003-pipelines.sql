-- Pipelines whose last build failed: a tenant's builds of one name in one queue, and how many failed in a row.
create table pipelines (
  tenant text not null,
  queue text not null,
  name text not null,
  failures {int} not null,
  updated_ms {int} not null,
  primary key (tenant, queue, name)
){strict};
create index pipelines_failing on pipelines (failures);
