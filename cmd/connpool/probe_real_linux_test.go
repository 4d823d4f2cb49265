package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/short"
)

// find looks for a program in PATH and where Debian puts servers.
func find(t *testing.T, program string) string {
	t.Helper()
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, pattern := range []string{"/usr/sbin/", "/usr/lib/postgresql/*/bin/"} {
		if found, _ := filepath.Glob(pattern + program); len(found) > 0 {
			return found[len(found)-1]
		}
	}
	t.Skipf("there is no %s on this machine", program)
	return ""
}

// nobody returns the user that runs the servers if the tests run as root.
func nobody(t *testing.T, dir string) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Skipf("we are root, and there is no other user to run a server: %v", err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	require.NoError(t, os.Chown(dir, uid, gid))
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "cp")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func aPort(t *testing.T) string {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// launch starts a server and waits until it accepts connections. The server ends with the
// test, and with the test binary.
func launch(t *testing.T, as *syscall.Credential, stop syscall.Signal, dir, port string, argv ...string) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &log, &log
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as, Pdeathsig: stop}
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(stop)
		<-ended
		if t.Failed() {
			t.Logf("the server said:\n%s", log.String())
		}
	})
	up := eventually(time.Minute, func() bool {
		nc, err := net.Dial("tcp4", "127.0.0.1:"+port)
		if err == nil {
			nc.Close()
		}
		select {
		case <-ended:
			return true
		default:
		}
		return err == nil
	})
	require.True(t, up, "the server does not come up")
}

// loadOf runs load for some requests, without errors.
func loadOf(t *testing.T, to, probe string) {
	t.Helper()
	var out, errs bytes.Buffer
	status := run(t.Context(), []string{"load", "-to", to, "-probe", probe, "-n", "40", "-rounds", "2", "-workers", "4", "-json", "-quiet"}, &out, &errs)
	require.Equal(t, exitOK, status, errs.String())
	var r struct {
		Ways []struct {
			Answers uint64
			Errors  map[string]uint64
		} `json:"ways"`
	}
	require.NoError(t, json.Unmarshal(out.Bytes(), &r))
	for _, w := range r.Ways {
		assert.EqualValues(t, 40, w.Answers)
		assert.Empty(t, w.Errors)
	}
}

// ORA-77
func TestLoadAndSizeMeasureARealRedis(t *testing.T) {
	t.Setenv("REDISCLI_AUTH", "secret")
	server := find(t, "redis-server")
	dir := shortDir(t)
	port := aPort(t)
	launch(t, nobody(t, dir), syscall.SIGTERM, dir, port, server, "--bind", "127.0.0.1", "--port", port, "--dir", dir,
		"--save", "", "--appendonly", "no", "--requirepass", "secret", "--maxclients", "24")
	to := "tcp://127.0.0.1:" + port
	loadOf(t, to, "redis")
	loadOf(t, to, "hex:50494e470d0a,len=33") // an inline PING before AUTH: -NOAUTH Authentication required.

	// It accepts 24 clients and no more, and the ramp finds that number.
	status, out, errs := runSize(t, "-to", to, "-probe", "redis", "-step", "50ms", "-limit", "1s", "-json", "-quiet")
	require.Equal(t, exitOK, status, errs)
	var e experiment
	require.NoError(t, json.Unmarshal([]byte(out), &e))
	assert.Equal(t, endedByErrors, e.Ended)
	assert.Equal(t, 24, e.Within)

	t.Setenv("REDISCLI_AUTH", "")
	status, _, errs = runSize(t, "-to", to, "-probe", "redis", "-step", "50ms", "-limit", "1s")
	assert.Equal(t, exitBroken, status)
	assert.Contains(t, errs, "REDISCLI_AUTH")
}

// ORA-77
func TestPostgresProbeLogsInEveryWayItSays(t *testing.T) {
	initdb, server := find(t, "initdb"), find(t, "postgres")
	dir := shortDir(t)
	as := nobody(t, dir)
	password := filepath.Join(dir, "password")
	require.NoError(t, os.WriteFile(password, []byte("p'w ord\n"), 0o644))
	data := filepath.Join(dir, "data")
	init := exec.Command(initdb, "-D", data, "-U", "postgres", "--pwfile", password, "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8", "--wal-segsize=1")
	init.Dir = dir
	init.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	said, err := init.CombinedOutput()
	if err != nil && os.IsPermission(err) {
		t.Skipf("this root may not run initdb as somebody else: %v", err)
	}
	require.NoError(t, err, "%s", said)

	// The user decides the way of logging in. The password of each is stored as its way
	// needs.
	hba := ""
	for _, how := range []string{"scram-sha-256", "md5", "password", "trust"} {
		hba += fmt.Sprintf("host all %q 127.0.0.1/32 %s\n", "u-"+how, how)
	}
	hba += "host all postgres 127.0.0.1/32 scram-sha-256\n"
	require.NoError(t, os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(hba), 0o644))
	port := aPort(t)
	launch(t, as, syscall.SIGINT, dir, port, server, "-D", data, "-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
		"-c", "fsync=off", "-c", "shared_buffers=2MB", "-c", "autovacuum=off", "-c", "max_connections=80")
	to := "tcp://127.0.0.1:" + port
	t.Setenv("PGDATABASE", "postgres")
	t.Setenv("PGUSER", "postgres")
	t.Setenv("PGPASSWORD", "p'w ord")
	var o *own
	require.True(t, eventually(time.Minute, func() bool {
		o, err = ownTo(t, "127.0.0.1:"+port, "postgres")
		return err == nil || !strings.Contains(err.Error(), "57P03") // starting up
	}))
	require.NoError(t, err, "SCRAM-SHA-256")
	for _, sql := range []string{
		"create role \"u-scram-sha-256\" login password 'p''w ord'",
		"create role \"u-password\" login password 'p''w ord'",
		"create role \"u-trust\" login",
		"set password_encryption = md5; create role \"u-md5\" login password 'p''w ord'",
	} {
		o.session.(*postgresSession).query = postgresMessage('Q', sql+"\x00")
		_, err := o.exchange()
		require.NoError(t, err, sql)
	}
	for _, how := range short.Of([]string{"scram-sha-256", "md5", "password", "trust"}, []string{"scram-sha-256", "trust"}) {
		t.Run(how, func(t *testing.T) {
			t.Setenv("PGUSER", "u-"+how)
			loadOf(t, to, "postgres:select count(*) from pg_class")
			if how == "trust" {
				return
			}
			t.Setenv("PGPASSWORD", "wrong")
			_, err := ownTo(t, "127.0.0.1:"+port, "postgres")
			require.ErrorContains(t, err, "28P01")
		})
	}
}
