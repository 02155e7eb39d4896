-- Records of several clinics in one table, of which a transaction sees one clinic's, and without a clinic none.
-- Run it as the owner of the tables; the service's roles own none.
CREATE TABLE records (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- A row belongs to the clinic of its transaction, and nobody writes the column.
    clinic text NOT NULL DEFAULT current_setting('app.clinic', true) CHECK (clinic <> ''),
    number text NOT NULL,
    content text NOT NULL,
    -- With the clinic in front: a number of another clinic is neither refused nor told.
    UNIQUE (clinic, number)
);

ALTER TABLE records ENABLE ROW LEVEL SECURITY;
-- For the owner too: a migration, or a job that runs as app_owner, sees no clinic's rows unless it names the clinic.
ALTER TABLE records FORCE ROW LEVEL SECURITY;
-- Without the setting it is NULL, and where an earlier transaction had one it is ''. Neither equals any clinic.
CREATE POLICY of_clinic ON records
    USING (clinic = nullif(current_setting('app.clinic', true), ''))
    WITH CHECK (clinic = nullif(current_setting('app.clinic', true), ''));
