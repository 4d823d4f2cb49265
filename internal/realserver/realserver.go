//go:build unix

// Package realserver starts the distribution's servers for tests: on loopback, on a port
// that was free, in a folder of their own, and never as root (but for Itself). A server ends with its
// test; on Linux it also ends when the test's process is killed.
package realserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startTime bounds the start of a server, and its end.
const startTime = 30 * time.Second

// Server is a running server.
type Server struct {
	Addr string // host and port
	Dir  string // the server writes only there

	left  chan struct{} // closed when the process is gone
	proc  *os.Process
	stop  syscall.Signal
	again func() *exec.Cmd // the command that started it
}

// Kind says how a server is started.
type Kind struct {
	Program string         // its name, see Find
	Package string         // the distribution's package that has it
	Stop    syscall.Signal // ends the server cleanly
	// Prepare runs before the first start, with a function that runs a
	// program as the user of the server. It may be nil.
	Prepare func(dir string, run func(argv ...string) error) error
	// Args are the arguments for a server on 127.0.0.1:port.
	Args func(dir string, port int) []string
	// Env is more of the environment of such a server. It may be nil.
	Env func(port int) []string

	module  string // a module of Python without which there is no server; "": none
	asWeAre bool   // as our own user, since no other may read the program
}

// Redis is a redis-server that stores nothing on disk, with more arguments if given.
func Redis(more ...string) Kind {
	return Kind{
		Program: "redis-server", Package: "redis-server", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			return append([]string{"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", dir,
				"--save", "", "--appendonly", "no", "--loglevel", "warning"}, more...)
		},
	}
}

// Postgres is a PostgreSQL that lets everybody in as the user "postgres", with more arguments if
// given. It listens before it lets anybody in.
func Postgres(more ...string) Kind {
	return Kind{
		Program: "postgres", Package: "postgresql", Stop: syscall.SIGINT,
		Prepare: func(dir string, run func(argv ...string) error) error {
			return run("initdb", "-D", filepath.Join(dir, "data"), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
		},
		Args: func(dir string, port int) []string {
			return append([]string{"-D", filepath.Join(dir, "data"), "-h", "127.0.0.1", "-p", strconv.Itoa(port), "-k", dir, "-F"}, more...)
		},
	}
}

// Slapd is an OpenLDAP server with the suffix dc=test, whose administrator cn=admin,dc=test has
// the password "secret". Everybody may read.
func Slapd() Kind { return slapd(nil) }

// SlapdTLS is a Slapd that speaks TLS from the first byte.
func SlapdTLS(cert tls.Certificate) Kind { return slapd(&cert) }

func slapd(cert *tls.Certificate) Kind {
	scheme, files := "ldap", ""
	if cert != nil {
		scheme, files = "ldaps", "TLSCertificateFile cert.pem\nTLSCertificateKeyFile key.pem\n"
	}
	return Kind{
		Program: "slapd", Package: "slapd", Stop: syscall.SIGTERM,
		Prepare: func(dir string, _ func(argv ...string) error) error {
			if cert != nil {
				if err := writePEM(dir, *cert); err != nil {
					return err
				}
			}
			data := filepath.Join(dir, "data")
			if err := os.Mkdir(data, 0o777); err != nil {
				return err
			}
			if err := os.Chmod(data, 0o777); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "slapd.conf"), []byte("include /etc/ldap/schema/core.schema\n"+files+
				"database ldif\ndirectory "+data+"\nsuffix dc=test\nrootdn cn=admin,dc=test\nrootpw secret\n"), 0o644)
		},
		Args: func(dir string, port int) []string {
			return []string{"-d", "0", "-f", filepath.Join(dir, "slapd.conf"), "-h", fmt.Sprintf("%s://127.0.0.1:%d", scheme, port)}
		},
	}
}

// Dovecot is an IMAP server that lets everybody in with the password "secret".
func Dovecot() Kind {
	return Kind{
		Program: "dovecot", Package: "dovecot-imapd", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			name, group := "nobody", "nogroup"
			if os.Geteuid() != 0 {
				if u, err := user.Current(); err == nil {
					name, group = u.Username, u.Gid
				}
			}
			conf := filepath.Join(dir, "dovecot.conf")
			os.WriteFile(conf, fmt.Appendf(nil, `protocols = imap
listen = 127.0.0.1
base_dir = %[1]s/run
state_dir = %[1]s/state
log_path = %[1]s/dovecot.log
ssl = no
disable_plaintext_auth = no
default_internal_user = %[2]s
default_internal_group = %[3]s
default_login_user = %[2]s
first_valid_uid = 1
mail_max_userip_connections = 100
mail_location = maildir:%[1]s/mail
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=%[2]s gid=%[3]s home=%[1]s/home
}
service imap-login {
  chroot =
  inet_listener imap {
    port = %[4]d
  }
  inet_listener imaps {
    port = 0
  }
}
service anvil {
  chroot =
}
service stats {
  chroot =
}
`, dir, name, group, port), 0o644)
			return []string{"-F", "-c", conf}
		},
	}
}

// Unbound is a DNS server over TCP, or over TLS if there is a certificate. It knows the names
// n0.test. to n2047.test., each with its number as TXT, and refuses what is below refused.test.
func Unbound(cert *tls.Certificate) Kind {
	return Kind{
		Program: "unbound", Package: "unbound", Stop: syscall.SIGTERM,
		Prepare: func(dir string, _ func(argv ...string) error) error {
			if cert == nil {
				return nil
			}
			return writePEM(dir, *cert)
		},
		Args: func(dir string, port int) []string {
			conf := fmt.Appendf(nil, "server:\n interface: 127.0.0.1@%d\n port: %[1]d\n do-udp: no\n num-threads: 1\n"+
				" incoming-num-tcp: 100\n use-syslog: no\n username: \"\"\n chroot: \"\"\n directory: %q\n pidfile: \"\"\n"+
				" module-config: \"iterator\"\n local-zone: test. static\n local-zone: refused.test. refuse\n", port, dir)
			if cert != nil {
				conf = fmt.Appendf(conf, " tls-port: %d\n tls-service-pem: cert.pem\n tls-service-key: key.pem\n", port)
			}
			for i := range 2048 {
				conf = fmt.Appendf(conf, " local-data: 'n%d.test. 60 TXT \"%[1]d\"'\n", i)
			}
			conf = append(conf, "remote-control:\n control-enable: no\n"...)
			os.WriteFile(filepath.Join(dir, "unbound.conf"), conf, 0o644)
			return []string{"-d", "-c", filepath.Join(dir, "unbound.conf")}
		},
	}
}

// python is the system's, for which the distribution's packages are.
const python = "/usr/bin/python3"

// SMTP is a mail server that offers STARTTLS if there is a certificate, and knows the user "user"
// with the password "secret". It refuses recipients whose name begins with "nobody", and messages
// that contain "spam"; the reply to any other message ends with its last line. It logs each QUIT.
func SMTP(cert *tls.Certificate) Kind {
	return Kind{
		Program: python, Package: "python3-aiosmtpd", Stop: syscall.SIGTERM, module: "aiosmtpd",
		Prepare: func(dir string, _ func(argv ...string) error) error {
			if cert != nil {
				if err := writePEM(dir, *cert); err != nil {
					return err
				}
			}
			return os.WriteFile(filepath.Join(dir, "server.py"), []byte(smtpServer), 0o644)
		},
		Args: func(dir string, port int) []string { return []string{"server.py", strconv.Itoa(port)} },
	}
}

const smtpServer = `import asyncio, os, ssl, sys
from aiosmtpd.smtp import SMTP, AuthResult

class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("nobody"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, server, session, envelope):
        if b"spam" in envelope.content:
            return "554 5.6.0 refused"
        return "250 2.0.0 taken as " + envelope.content.decode().split()[-1]

    async def handle_QUIT(self, server, session, envelope):
        print("QUIT", flush=True)
        return "221 2.0.0 bye"

def authenticate(server, session, envelope, mechanism, data):
    return AuthResult(handled=False, success=data.login == b"user" and data.password == b"secret")

async def main():
    tls = None
    if os.path.exists("cert.pem"):
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain("cert.pem", "key.pem")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(Handler(), tls_context=tls, require_starttls=tls is not None, hostname="localhost",
                     authenticator=authenticate, auth_required=tls is not None, loop=loop),
        "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
`

// Modbus is a Modbus/TCP device with 2048 holding registers, each of which holds its own address.
// Other addresses are illegal.
func Modbus() Kind {
	return Kind{
		Program: python, Package: "python3-pymodbus, with python3-serial-asyncio", Stop: syscall.SIGTERM, module: "pymodbus.server",
		Prepare: func(dir string, _ func(argv ...string) error) error {
			return os.WriteFile(filepath.Join(dir, "server.py"), []byte(modbusServer), 0o644)
		},
		Args: func(dir string, port int) []string { return []string{"server.py", strconv.Itoa(port)} },
	}
}

const modbusServer = `import asyncio, sys
from pymodbus.datastore import ModbusSequentialDataBlock, ModbusServerContext, ModbusSlaveContext
from pymodbus.server import StartAsyncTcpServer

registers = ModbusSequentialDataBlock(0, list(range(2048)))
device = ModbusSlaveContext(hr=registers, zero_mode=True)
asyncio.run(StartAsyncTcpServer(
    context=ModbusServerContext(slaves=device, single=True),
    address=("127.0.0.1", int(sys.argv[1])), allow_reuse_address=True))
`

// Itself is the program that runs the test, once more: its TestMain finds env in the environment
// and is the server.
func Itself(t testing.TB, env func(port int) []string) Kind {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Kind{
		Program: program, Stop: syscall.SIGTERM, asWeAre: true, Env: env,
		Args: func(string, int) []string { return nil },
	}
}

// writePEM writes a certificate and its key to the files cert.pem and key.pem.
func writePEM(dir string, cert tls.Certificate) error {
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return err
	}
	var chain []byte
	for _, der := range cert.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	if err := os.WriteFile(filepath.Join(dir, "cert.pem"), chain, 0o644); err != nil {
		return err
	}
	// The key of a test, in a folder of the test, which the server reads as another user.
	return os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o644)
}

// VSFTPD is an FTP server that lets everybody in as the user "anonymous", to read the folder
// "files" of its own folder. It writes each command that it gets to the file "vsftpd.log" there.
func VSFTPD() Kind {
	return Kind{
		Program: "vsftpd", Package: "vsftpd", Stop: syscall.SIGTERM,
		Prepare: func(dir string, run func(argv ...string) error) error {
			if err := os.Mkdir(filepath.Join(dir, "files"), 0o755); err != nil {
				return err
			}
			ours, conf := filepath.Join(dir, "conf"), filepath.Join(dir, "vsftpd.conf")
			err := os.WriteFile(ours, fmt.Appendf(nil, `listen=YES
listen_address=127.0.0.1
background=NO
run_as_launching_user=YES
one_process_model=YES
anonymous_enable=YES
no_anon_password=YES
anon_root=%[1]s/files
local_enable=NO
connect_from_port_20=NO
pasv_address=127.0.0.1
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
secure_chroot_dir=%[1]s/files
xferlog_enable=YES
log_ftp_protocol=YES
vsftpd_log_file=%[1]s/vsftpd.log
`, dir), 0o644)
			if err != nil {
				return err
			}
			return run("cp", ours, conf) // it reads only a file of its own user
		},
		Args: func(dir string, port int) []string {
			return []string{filepath.Join(dir, "vsftpd.conf"), fmt.Sprintf("-olisten_port=%d", port)}
		},
	}
}

// MicroSOCKS is a SOCKS5 proxy that connects to everything. With a user, it asks for that user
// and password.
func MicroSOCKS(user, password string) Kind {
	return Kind{
		Program: "microsocks", Package: "microsocks", Stop: syscall.SIGTERM,
		Args: func(_ string, port int) []string {
			args := []string{"-i", "127.0.0.1", "-p", strconv.Itoa(port)}
			if user != "" {
				args = append(args, "-u", user, "-P", password)
			}
			return args
		},
	}
}

// Tinyproxy is an HTTP proxy that carries out CONNECT to every port, with more lines of its
// configuration if given.
func Tinyproxy(more ...string) Kind {
	return Kind{
		Program: "tinyproxy", Package: "tinyproxy-bin", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			conf := filepath.Join(dir, "tinyproxy.conf")
			os.WriteFile(conf, fmt.Appendf(nil, "Port %d\nListen 127.0.0.1\nTimeout 600\nMaxClients 100\nAllow 127.0.0.1\n%s\n",
				port, strings.Join(more, "\n")), 0o644)
			return []string{"-d", "-c", conf}
		},
	}
}

// Find returns the path of a program, from PATH or from where Debian puts servers. Of
// several versions it returns the newest. If the program is missing, Find skips the test.
func Find(t testing.TB, program, pkg string) string {
	t.Helper()
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, pattern := range []string{"/usr/sbin", "/usr/lib/postgresql/*/bin"} {
		found, _ := filepath.Glob(filepath.Join(pattern, program))
		if len(found) > 0 {
			return slices.MaxFunc(found, func(a, b string) int {
				return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b))
			})
		}
	}
	t.Skipf("there is no %s on this machine: install the package %s", program, pkg)
	return ""
}

// Start starts a server and returns when it accepts connections.
func Start(t testing.TB, k Kind) *Server {
	t.Helper()
	path := Find(t, k.Program, k.Package)
	if k.module != "" && exec.Command(path, "-c", "import "+k.module).Run() != nil {
		t.Skipf("%s has no module %s: install the package %s", path, k.module, k.Package)
	}
	dir, err := os.MkdirTemp("", "rs") // short: a Unix socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	as := process()
	if os.Geteuid() == 0 && !k.asWeAre {
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Skipf("we are root, and there is no other user to run %s: %v", k.Program, err)
		}
		uid, _ := strconv.Atoi(nobody.Uid)
		gid, _ := strconv.Atoi(nobody.Gid)
		as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	command := func(path string, argv ...string) *exec.Cmd {
		cmd := exec.Command(path, argv...)
		cmd.Dir, cmd.SysProcAttr = dir, as
		cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=" + dir}
		return cmd
	}
	if k.Prepare != nil {
		err := k.Prepare(dir, func(argv ...string) error {
			out, err := command(Find(t, argv[0], k.Package), argv[1:]...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%v: %w\n%s", argv, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// A port that is free now may be taken when the server binds it.
	for range 5 {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Dir: dir, stop: k.Stop}
		s.again = func() *exec.Cmd {
			cmd := command(path, k.Args(dir, port)...)
			if k.Env != nil {
				cmd.Env = append(cmd.Env, k.Env(port)...)
			}
			return cmd
		}
		if err = s.run(s.again()); err == nil {
			t.Cleanup(s.Stop)
			return s
		}
		t.Log(err)
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	t.Fatalf("%s does not start, in five tries on five ports:\n%s", k.Program, log)
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// run starts the process and waits until it listens.
func (s *Server) run(cmd *exec.Cmd) error {
	log, err := os.OpenFile(filepath.Join(s.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = log, log
	left := make(chan struct{})
	s.left = left
	started := make(chan error)
	go func() {
		// The kernel ends the server when the thread that started it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(left)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	s.proc = cmd.Process
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		if nc, err := new(net.Dialer).DialContext(ctx, "tcp", s.Addr); err == nil {
			nc.Close()
			return nil
		}
		select {
		case <-s.left:
			return fmt.Errorf("%s ended at its start: %v", cmd.Path, cmd.ProcessState)
		case <-ctx.Done():
			s.Stop()
			return fmt.Errorf("%s does not listen", cmd.Path)
		case <-again.C:
		}
	}
}

// Restart ends the server and starts it again, on the same port.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Stop()
	if err := s.run(s.again()); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the server, by force if that takes too long, and returns when it has ended.
// It may be called again.
func (s *Server) Stop() {
	s.proc.Signal(s.stop)
	select {
	case <-s.left:
	case <-time.After(startTime):
		s.proc.Kill()
		<-s.left
	}
}
