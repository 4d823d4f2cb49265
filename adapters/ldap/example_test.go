package ldap_test

import (
	"context"
	"log"
	"os"

	"github.com/go-ldap/ldap/v3"

	"github.com/seed-ecb488c9/connpool"
	poolldap "github.com/seed-ecb488c9/connpool/adapters/ldap"
)

func Example() {
	login := func(_ connpool.Addr, l *ldap.Conn) error { return l.Bind("cn=app,dc=example", os.Getenv("PASSWORD")) }
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 8, Setup: poolldap.Setup(login)})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	client := poolldap.New(pool, connpool.MustParseAddr("tls://ldap.example:636"))
	found, err := client.Search(context.Background(), ldap.NewSearchRequest("dc=example",
		ldap.ScopeWholeSubtree, ldap.NeverDerefAliases, 0, 0, false, "(uid=ada)", nil, nil))
	log.Println(found, err)
}
