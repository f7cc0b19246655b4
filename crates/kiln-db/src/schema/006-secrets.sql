-- Secrets that tenants keep. `sealed` opens only with a key outside the database, and only in this row at this version.
create table secrets (
  tenant text not null,
  name text not null,
  version {int} not null,
  sealed text,
  source text,
  scope text not null,
  created_ms {int} not null,
  created_by text not null,
  rotated_ms {int},
  rotated_by text,
  primary key (tenant, name)
){strict};

create index audit_secrets on audit (tenant, target, seq) where action like 'secret%';
