package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"

	"github.com/seed-ecb488c9/connpool"
)

// postgresSession speaks version 3 of the protocol, with simple queries.
type postgresSession struct {
	*wire
	query []byte // the message as it is sent
}

func postgresProbe(sql string) func(context.Context, connpool.Addr, net.Conn) (session, error) {
	return func(_ context.Context, _ connpool.Addr, nc net.Conn) (session, error) {
		name, database, password := postgresLogin()
		s := &postgresSession{newWire(nc), postgresMessage('Q', sql+"\x00")}
		if err := s.login(name, database, password); err != nil {
			return nil, err
		}
		return s, nil
	}
}

// postgresLogin returns the names and the password that psql would use.
func postgresLogin() (name, database, password string) {
	if name = os.Getenv("PGUSER"); name == "" {
		name = "postgres"
		if u, err := user.Current(); err == nil {
			name = u.Username
		}
	}
	if database = os.Getenv("PGDATABASE"); database == "" {
		database = name
	}
	return name, database, os.Getenv("PGPASSWORD")
}

// postgresMessage builds a message with its length. The first message of a connection has
// no kind.
func postgresMessage(kind byte, body string) []byte {
	var m []byte
	if kind != 0 {
		m = append(m, kind)
	}
	m = binary.BigEndian.AppendUint32(m, uint32(len(body)+4))
	return append(m, body...)
}

// receive reads one message; the body is valid until the next call.
func (s *postgresSession) receive() (kind byte, body []byte, err error) {
	var head [5]byte
	s.forget()
	if _, err := io.ReadFull(s, head[:]); err != nil {
		return 0, nil, s.lastWords(err)
	}
	n := int64(binary.BigEndian.Uint32(head[1:])) - 4
	if n < 0 || n > maxAnswer {
		return 0, nil, unexpected("this is not PostgreSQL: a message of %d bytes, in %q", n, s.heard())
	}
	body = make([]byte, n)
	_, err = io.ReadFull(s, body)
	return head[0], body, err
}

// refused returns the text of an error message of the server: fields of a letter and a
// string each.
func refused(body []byte) error {
	text, code := "", ""
	for _, field := range bytes.Split(body, []byte{0}) {
		if len(field) > 1 {
			switch field[0] {
			case 'M':
				text = string(field[1:])
			case 'C':
				code = string(field[1:])
			}
		}
	}
	return unexpected("the server says: %s (%s)", shortened([]byte(text)), code)
}

// exchange sends the query and reads up to "ready for query". If the server hangs up, the
// error is what it sent before.
func (s *postgresSession) exchange() (bool, error) {
	var failed error
	asked := s.send(s.query)
	answered := false
	for {
		kind, body, err := s.receive()
		switch {
		case err != nil && failed != nil:
			return false, failed
		case asked != nil && err != nil:
			return false, asked
		case err != nil:
			return false, err
		case kind == 'E':
			failed = refused(body)
		case kind == 'C', kind == 'I': // a command is complete, or was empty
			answered = true
		case kind == 'Z' && failed == nil && !answered:
			return false, unexpected("the server is ready for a query without having answered this one")
		case kind == 'Z':
			return failed == nil, failed
		}
	}
}

// The kinds of authentication request.
const (
	authOK        = 0
	authClear     = 3
	authMD5       = 5
	authSASL      = 10
	authSASLMore  = 11
	authSASLFinal = 12
)

func (s *postgresSession) login(name, database, password string) error {
	sent := s.send(postgresMessage(0, "\x00\x03\x00\x00user\x00"+name+"\x00database\x00"+database+
		"\x00application_name\x00connpool\x00\x00"))
	var proof *scram
	for {
		kind, body, err := s.receive()
		switch {
		case sent != nil && err != nil:
			return sent // the server did not say why either
		case err != nil:
			return err
		case kind == 'E':
			return refused(body)
		case kind == 'Z':
			return nil
		case kind != 'R':
			continue // settings, the key for cancelling, notices
		case len(body) < 4:
			return unexpected("this is not PostgreSQL: a log-in message of %d bytes", len(body))
		}
		how := binary.BigEndian.Uint32(body)
		body = body[4:]
		if how != authOK && how != authSASLFinal && password == "" {
			return unexpected("the server wants a password for user %q: put it into PGPASSWORD", name)
		}
		var reply string
		switch {
		case how == authOK:
			if proof != nil && !proof.verified {
				return unexpected("the server did not prove that it knows the password")
			}
			continue
		case how == authClear:
			reply = password + "\x00"
		case how == authMD5 && len(body) >= 4:
			reply = "md5" + md5Hex(md5Hex(password+name)+string(body[:4])) + "\x00"
		case how == authSASL && bytes.Contains(body, []byte("SCRAM-SHA-256\x00")):
			proof = newSCRAM(password)
			first := proof.first()
			reply = "SCRAM-SHA-256\x00" + string(binary.BigEndian.AppendUint32(nil, uint32(len(first)))) + first
		case how == authSASLMore && proof != nil:
			if reply, err = proof.final(string(body)); err != nil {
				return err
			}
		case how == authSASLFinal && proof != nil:
			if err := proof.verify(string(body)); err != nil {
				return err
			}
			continue
		default:
			return unexpected("the server wants authentication of kind %d, which this probe does not speak; allow trust, password, md5 or scram-sha-256 in pg_hba.conf", how)
		}
		sent = s.send(postgresMessage('p', reply))
	}
}

func md5Hex(text string) string {
	sum := md5.Sum([]byte(text))
	return hex.EncodeToString(sum[:])
}

// scram is the client's side of SCRAM-SHA-256 (RFC 5802, 7677) without channel binding.
// PostgreSQL takes the user's name from the start-up message. The password is used
// without normalisation, which only matters for passwords beyond ASCII.
type scram struct {
	password, nonce, bare string
	serverSignature       []byte
	verified              bool
}

func newSCRAM(password string) *scram {
	return &scram{password: password, nonce: rand.Text()}
}

func (s *scram) first() string {
	s.bare = "n=,r=" + s.nonce
	return "n,," + s.bare
}

// final answers the server's challenge.
func (s *scram) final(challenge string) (string, error) {
	var nonce, salt64, count string
	for _, field := range strings.Split(challenge, ",") {
		switch key, value, _ := strings.Cut(field, "="); key {
		case "r":
			nonce = value
		case "s":
			salt64 = value
		case "i":
			count = value
		}
	}
	salt, err := base64.StdEncoding.DecodeString(salt64)
	rounds, err2 := strconv.Atoi(count)
	if err != nil || err2 != nil || len(salt) == 0 || rounds < 1 || rounds > 1<<24 ||
		!strings.HasPrefix(nonce, s.nonce) || nonce == s.nonce {
		return "", unexpected("the server's SCRAM challenge is not sound")
	}
	salted, err := pbkdf2.Key(sha256.New, s.password, salt, rounds, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("SCRAM: %w", err)
	}
	unproven := "c=biws,r=" + nonce // biws: "n,," in base64
	signed := s.bare + "," + challenge + "," + unproven
	clientKey := hmacSHA256(salted, "Client Key")
	storedKey := sha256.Sum256(clientKey)
	signature := hmacSHA256(storedKey[:], signed)
	proof := make([]byte, len(clientKey))
	subtle.XORBytes(proof, clientKey, signature)
	s.serverSignature = hmacSHA256(hmacSHA256(salted, "Server Key"), signed)
	return unproven + ",p=" + base64.StdEncoding.EncodeToString(proof), nil
}

// verify checks that the server knows the password too.
func (s *scram) verify(last string) error {
	text, ok := strings.CutPrefix(last, "v=")
	got, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || !hmac.Equal(got, s.serverSignature) {
		return unexpected("the server did not prove that it knows the password")
	}
	s.verified = true
	return nil
}

func hmacSHA256(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}
